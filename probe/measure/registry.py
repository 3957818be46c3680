"""All measurements by name."""

import pandas as pd

from probe.measure.accuracy import ACCURACY
from probe.measure.base import Measurement
from probe.measure.beyond import LOSS_BY_POSITION, PASSKEY, PERPLEXITY
from probe.measure.census import CENSUS
from probe.measure.geometry import GEOMETRY
from probe.measure.mechanism import MECHANISM
from probe.measure.needle import NEEDLE
from probe.measure.pairs import MODEL_DISTANCE, MODEL_ORDER, TRAINED_T5
from probe.measure.probes import EXTRAPOLATION, FIT, OVER_TRAINING, PROBE
from probe.measure.shifted import SHIFTED
from probe.measure.split import CURVES, ENTROPY, SPLIT
from probe.measure.table import TABLE, TABLE_BASIS, TABLE_MAP
from probe.measure.temperature import TEMPERATURE
from probe.measure.templates import MAPS, TEMPLATES
from probe.measure.use import USE

#: All measurements by name, in the order in which rows and pages have them.
MEASUREMENTS: dict[str, Measurement] = {
    "accuracy": ACCURACY,
    "shifted": SHIFTED,
    "probe": PROBE,
    "fit": FIT,
    "extrapolation": EXTRAPOLATION,
    "over_training": OVER_TRAINING,
    "use": USE,
    "geometry": GEOMETRY,
    "mechanism": MECHANISM,
    "templates": TEMPLATES,
    "census": CENSUS,
    "split": SPLIT,
    "curves": CURVES,
    "entropy": ENTROPY,
    "maps": MAPS,
    "temperature": TEMPERATURE,
    "loss_by_position": LOSS_BY_POSITION,
    "needle": NEEDLE,
    "table": TABLE,
    "table_basis": TABLE_BASIS,
    "table_map": TABLE_MAP,
    "perplexity": PERPLEXITY,
    "passkey": PASSKEY,
    "model_distance": MODEL_DISTANCE,
    "model_order": MODEL_ORDER,
    "trained_t5": TRAINED_T5,
}


def measurements() -> pd.DataFrame:
    """What can be measured: one row per measurement, with the columns name, what, needs, cost and asked."""
    return pd.DataFrame(
        {
            "name": name,
            "what": each.what,
            "needs": each.words(),
            "cost": each.cost,
            "asked": each.asked,
        }
        for name, each in MEASUREMENTS.items()
    )
