"""The grading child: reads JSON lines (answer, gold, seconds) on standard input, answers JSON lines on standard output.

Started as `python -m plumbline.rewards.child MEMORY_BYTES`. It may be killed at any moment, and ends by itself when a
comparison takes longer than its limit (should the parent be gone) or when its input is closed.
"""

from __future__ import annotations

import json
import os
import sys


def limit_memory(extra_bytes: int) -> None:
    """Let the address space grow by so many bytes over what it is now (where the system knows such limits)."""
    try:
        import resource
    except ImportError:
        return
    pages = 0
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as statm:
            pages = int(statm.read().split()[0])
    ceiling = pages * os.sysconf("SC_PAGE_SIZE") + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))


def answer_line(line: str, second_opinion: bool) -> list[str]:
    """[reason, detail] of one request."""
    answer, gold, seconds = json.loads(line)
    if hasattr(os, "fork"):
        import signal

        # No handler: the system ends this process, whatever it is stuck in. The parent kills earlier.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
    try:
        if second_opinion:
            from plumbline.rewards.checking.second import agrees

            equal = agrees(answer, gold)
        else:
            from plumbline.rewards.equivalence import compare

            equal = compare(answer, gold, deep=True) is True
        return ["correct" if equal else "wrong", ""]
    except MemoryError:
        return ["error", "out of memory"]
    except RecursionError:
        return ["error", "nested too deeply"]
    except Exception as error:  # a verdict of its own, counted and shown, whatever a library raised
        return ["error", f"{type(error).__name__}: {error}"[:200]]
    finally:
        if hasattr(os, "fork"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    # The protocol owns the real standard output; anything a library prints goes to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    second_opinion = sys.argv[2:] == ["second"]
    if second_opinion:
        import plumbline.rewards.checking.second
    else:
        import plumbline.rewards.deep
        import plumbline.rewards.equivalence  # noqa: F401
    limit_memory(int(sys.argv[1]))
    print("ready", file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer_line(line, second_opinion)), file=channel, flush=True)


if __name__ == "__main__":
    main()
