"""Group a model's parameters into parts that a reader knows, by their names.

The groups are the embedding, the head, and for each layer the attention's q, k, v and o (or what a fused matrix holds),
the MLP with its router and experts, and the norms.
"""

import re
from typing import Any

EMBEDDING, HEAD, TIED = "embedding", "head", "embedding and head"
_ATTENTION = r"(?:\w+\.)*\w*att(?:ention|n)\w*\.(?:\w+\.)*"
_KINDS = {
    "norms": r"(?:\w+\.)*(?:\w*norm\w*|ln|ln_\w+)",
    "q": rf"{_ATTENTION}(?:q|wq|q_proj|q_a_proj|q_b_proj|q_lin|query)",
    "k": rf"{_ATTENTION}(?:k|wk|k_proj|k_lin|key)",
    "v": rf"{_ATTENTION}(?:v|wv|v_proj|v_lin|value)",
    "o": rf"{_ATTENTION}(?:o|wo|o_proj|out_proj|c_proj|out_lin|dense)",
    "qkv": rf"{_ATTENTION}(?:c_attn|qkv|qkv_proj|Wqkv|query_key_value)",
    "kv": rf"{_ATTENTION}(?:kv_proj|kv_a_proj|kv_a_proj_with_mqa|kv_b_proj)",
    "mlp": r"(?:\w+\.)*(?:mlp|ffn|feed_forward|feedforward|block_sparse_moe|moe|experts|fc1|fc2|fc_in|fc_out)",
    EMBEDDING: r"(?:\w+\.)*(?:wte|wpe|\w*embed\w*)",
    HEAD: r"(?:\w+\.)*lm_head",
}
"""Expressions for the beginning of a name, whole modules of it; the first that matches counts."""
_PATTERNS = {kind: re.compile(rf"{start}(?:\.|$)") for kind, start in _KINDS.items()}
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def group_of(name: str) -> str:
    """Return the group of a parameter by its name.

    The input embedding and the head are not recognised by name, see `parameter_groups`. A group is `layer 3 q` for
    q of the layer with number 3, from 0, and `norms` for a norm outside the layers. A name that no pattern knows falls
    into a group named after its module.
    """
    kind = next((kind for kind, pattern in _PATTERNS.items() if pattern.match(name)), None)
    if kind is None:
        return name.rpartition(".")[0] or name
    layer = _LAYER.search(name)
    return kind if layer is None else f"layer {layer[1]} {kind}"


def parameter_groups(model: Any) -> dict[str, str]:
    """Return the group of each parameter by its name, in the model's order.

    A parameter with several names is listed under the first. Weights that the embedding and the head share are one
    group, `embedding and head`.

    Args:
        model: a transformers causal language model without an adapter.
    """
    ends = ((EMBEDDING, model.get_input_embeddings()), (HEAD, model.get_output_embeddings()))
    known: dict[int, str] = {}
    for group, module in ends:
        for parameter in () if module is None else module.parameters():
            known[id(parameter)] = TIED if id(parameter) in known else group
    return {name: known.get(id(parameter), group_of(name)) for name, parameter in model.named_parameters()}
