"""TransformerLens's own scores of heads, on patterns that are there already."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


def head_detector_scores(
    pattern: Float[Tensor, "batch head query key"], tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, "batch"]
) -> dict[str, Float64[Tensor, "batch head"]]:
    """TransformerLens's ``head_detector`` on patterns that are there already: for "previous_token" and "induction" the
    share of all attention that falls on its detection pattern (error measure "mul"), of every sequence and head."""
    from transformer_lens import head_detector

    detect = {
        "previous_token": head_detector.get_previous_token_head_detection_pattern,
        "induction": head_detector.get_induction_head_detection_pattern,
    }
    found = {name: torch.zeros(pattern.shape[:2], dtype=torch.float64) for name in detect}
    for b, n in enumerate(lengths.tolist()):
        for name, detection_pattern in detect.items():
            wanted = detection_pattern(tokens[b : b + 1, :n].cpu())
            for head, rows in enumerate(pattern[b, :, :n, :n]):
                found[name][b, head] = head_detector.compute_head_attention_similarity_score(
                    rows, wanted, exclude_bos=False, exclude_current_token=False, error_measure="mul"
                )
    return found
