"""A folder with the models of a study, none of them trained: enough for scripts that measure such models."""

import dataclasses
import json
from pathlib import Path

from probe.models.checkpoint import save
from probe.models.decoder import Decoder
from probe.study.config import FORMAT, StudyConfig, StudyData, run_name


def untrained_study(folder: Path, **settings) -> StudyConfig:
    """Writes study.json and the models into the folder."""
    small = {"n_train": 200, "n_validation": 60, "n_test": 60, "trace_sequences": 12, "trace_length": 8}
    config = StudyConfig(**{**small, "model": {"n_layers": 2, "d_model": 16, "n_heads": 2}, **settings})
    data = StudyData.of(config)
    for encoding in config.encodings:
        for replica in range(config.n_seeds(encoding)):
            seed = config.training_of(encoding, replica).seed
            model = Decoder(config.decoder(data.task, encoding, data.n_ctx), seed=seed)
            save(model, folder / "models" / run_name(encoding, replica) / "final")
    (folder / "study.json").write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(config)}), encoding="utf-8")
    return config
