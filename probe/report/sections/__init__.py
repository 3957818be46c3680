"""The parts of a page, one file each: its figures, its section and its lines of the summary."""

from probe.report.sections import (
    accuracy,
    beyond,
    census,
    constructions,
    failures,
    geometry,
    kinds,
    mechanism,
    models,
    needle,
    passkey,
    probes,
    shifted,
    split,
    table,
    temperature,
    templates,
    use,
)
from probe.report.sections.base import Part, Results, table_part

#: The parts of a page by name, in the order in which a page shows them.
PARTS: dict[str, Part] = {
    "accuracy": accuracy.PART,
    "table": table.PART,
    "shifted": shifted.PART,
    "probes": probes.PART,
    "use": use.PART,
    "geometry": geometry.PART,
    "mechanism": mechanism.PART,
    "templates": templates.PART,
    "split": split.PART,
    "census": census.PART,
    "models": models.PART,
    "needle": needle.PART,
    "kinds": kinds.PART,
    "beyond": beyond.PART,
    "temperature": temperature.PART,
    "passkey": passkey.PART,
    "constructions": constructions.PART,
    "failures": failures.PART,
}

__all__ = ["PARTS", "Part", "Results", "table_part"]
