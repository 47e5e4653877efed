"""The vLLM plug-in: `vllm serve` and vLLM's LLM class run our policy folders, with full or sparse attention.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes.
"""


def register() -> None:
    """Make our configuration known to transformers and our architecture to vLLM. May be called any number of times."""
    from vllm import ModelRegistry

    import plumbline.models.config  # noqa: F401 (registers the configuration)

    if "Policy" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("Policy", "plumbline.models.vllm.model:ServedPolicy")
