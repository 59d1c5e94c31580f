"""PEFT's own tests of custom models, collected with our method's rows only.

Run through `run.py`, which puts a PEFT checkout on the path, so that `tests` is PEFT's package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from peftcli.methods.bottleneck_tuner import BottleneckConfig
from tests import test_custom_models as model_suite
from tests import testing_common


@dataclass
class SizedConfig(BottleneckConfig):
    """Our configuration with a default size, for tests that give `target_modules` only.

    Wide enough that random ReLU units of the suite's models, 2 to 20 features, are not all dead.
    """

    bottleneck_size: int | None = 16


def row(name: str, model: str, **settings: Any) -> tuple[str, str, type, dict[str, Any]]:
    return (name, model, SizedConfig, settings)


ROWS = [
    row("MLP 1", "MLP", target_modules="lin0"),
    row("MLP 2", "MLP", target_modules=["lin0"]),
    row("MLP 3", "MLP", target_modules=["lin1"]),
    row("MLP 4", "MLP", target_modules=["lin0", "lin1"]),
    row("MLP 5 saved", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
    row("MLP 6 no bias", "MLP", target_modules=["lin0"], use_bias=False),
    row("MLP 7 dropout", "MLP", target_modules=["lin0"], dropout=0.1),
    row("MLP 8 gelu", "MLP", target_modules=["lin0", "lin1"], non_linearity="gelu", scaling=4.0),
    row("MLP 9 parallel", "MLP", target_modules=["lin0"], placement="parallel"),
    row(
        "MLP 10 factor",
        "MLP",
        target_modules=["lin0"],
        bottleneck_size=None,
        reduction_factor=2.0,
    ),
    row("MLP 11 excluded", "MLP", target_modules=["lin0", "lin1"], exclude_modules=["lin1"]),
    row("Conv1D 1", "EmbConv1D", target_modules=["conv1d"]),
    row("Conv1D 2", "EmbConv1D", target_modules=["conv1d"], placement="parallel"),
    row("Conv1D 3", "EmbConv1D", target_modules=["lin0"], modules_to_save=["emb"]),
    row("LayerNorm", "MLP_LayerNorm", target_modules=["lin0"]),
    row("MLP2", "MLP2", target_modules=["lin0"]),
]
PAIRS = [
    (
        "Same",
        "bottleneck",
        SizedConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False},
    ),
    (
        "Different",
        "bottleneck",
        SizedConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
]
# In place, because the decorators of PEFT's tests hold these very lists.
model_suite.TEST_CASES[:] = ROWS
model_suite.ALL_PEFT_CONFIG_CLASSES[:] = [SizedConfig]
model_suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = PAIRS


def _skip_merging(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    pytest.skip("a bottleneck adapter cannot be merged")


testing_common._skip_if_merging_not_supported = _skip_merging
model_suite._skip_if_merging_not_supported = _skip_merging


class TestCustomModel(model_suite.TestPeftCustomModel):
    pass


class TestActiveAdapters(model_suite.TestMultipleActiveAdapters):
    pass
