"""Other tools that carry a plan out; apart from their recipes, which are heavy to import."""

from enum import StrEnum


class Tool(StrEnum):
    """Whose settings a plan is written as."""

    llm_compressor = "llm-compressor"
    gptqmodel = "gptqmodel"
    llama_cpp = "llama.cpp"
    modelopt = "modelopt"
