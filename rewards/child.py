"""The grading child: reads JSON lines (answer, gold) on standard input, answers JSON lines on standard output.

Started as `python -m plumbline.rewards.child MEMORY_BYTES`. It may be killed at any moment.
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
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0]) if os.path.exists("/proc/self/statm") else 0
    ceiling = pages * os.sysconf("SC_PAGE_SIZE") + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))


def main() -> None:
    # The protocol owns the real standard output; anything a library prints goes to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    limit_memory(int(sys.argv[1]))
    print("ready", file=channel, flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        try:
            # Timeouts inside math-verify need signals and do not kill; ours is the parent's.
            reference = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
            if not reference:
                result = ["bad_gold", ""]
            else:
                candidate = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
                equal = bool(candidate) and verify(reference, candidate, timeout_seconds=None)
                result = ["correct" if equal else "wrong", ""]
        except MemoryError:
            result = ["error", "out of memory"]
        except RecursionError:
            result = ["error", "nested too deeply"]
        except Exception as error:  # a verdict of its own, counted and shown, whatever the library raised
            result = ["error", f"{type(error).__name__}: {error}"[:200]]
        print(json.dumps(result), file=channel, flush=True)


if __name__ == "__main__":
    main()
