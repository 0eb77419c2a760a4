"""Processes of one run that were given different configs or different records. Real ones are in test_processes.py."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from peftjax.core import distributed
from peftjax.core.errors import UserError
from peftjax.training import agreement
from peftjax.training import config as configs
from peftjax.training.config import Config


@pytest.fixture
def process_1(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Lets this process be the second of two, the first of which has a given value."""

    def beside(value_of_first: Any) -> None:
        answers = iter([lambda own: [copy.deepcopy(value_of_first), own], lambda own: ["", own]])
        monkeypatch.setattr(distributed, "many", lambda: True)
        monkeypatch.setattr(distributed, "gather", lambda own: next(answers)(own))

    return beside


def values(config: Config) -> dict[str, Any]:
    return configs.to_dict(config)


def test_configs_must_be_the_same(process_1: Callable[[Any], None]) -> None:
    here = configs.changed(Config(), {"optim.learning_rate": 0.1})
    agreement.check_same_configs({"": here})
    process_1({"": values(configs.changed(here, {"data.workers": 3}))})
    agreement.check_same_configs({"": here})
    process_1({"": values(configs.changed(here, {"optim.learning_rate": 0.2, "train.eval_every": 7}))})
    with pytest.raises(
        UserError, match=r"the configs of process 1 .*: optim.learning_rate: 0.1 here, 0.2 there; train.eval"
    ):
        agreement.check_same_configs({"": here})
    process_1({"rank=4": values(here)})
    with pytest.raises(UserError, match="differ: rank=8 here, rank=4 there"):
        agreement.check_same_configs({"rank=8": here})


def test_records_must_be_the_same(process_1: Callable[[Any], None]) -> None:
    sources, counts = [["a.jsonl", 200], ["b.jsonl", 5]], {"records": 8, "tokens": 100}
    process_1({"sources": sources, "counts": counts})
    agreement.check_same_data("data.train", sources, counts)
    process_1({"sources": [["a.jsonl", 1500], ["b.jsonl", 5]], "counts": counts})
    with pytest.raises(
        UserError, match=r"the records in data.train of .* a.jsonl: 200 records here, 1,500 there; start"
    ):
        agreement.check_same_data("data.train", sources, counts)
    process_1({"sources": sources, "counts": counts | {"tokens": 101}})
    with pytest.raises(UserError, match="differ: the first batches have other records; start"):
        agreement.check_same_data("data.train", sources, counts)
