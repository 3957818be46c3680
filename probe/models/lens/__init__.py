"""TransformerLens at the edge.

``import transformer_lens`` takes seconds and hundreds of megabytes, so it happens inside these functions, when they are
called, and nowhere else.
"""

from probe.models.lens.detector import head_detector_scores
from probe.models.lens.ours import to_bridge
from probe.models.lens.released import bridge_of, load_bridge, untrained_bridge
from probe.models.pretrained import load_pretrained

__all__ = ["bridge_of", "head_detector_scores", "load_bridge", "load_pretrained", "to_bridge", "untrained_bridge"]
