"""Which settings go together with responses from a vLLM server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_run import changed, shared_output, tiny_config, tiny_data, tiny_model  # noqa: F401

from grade.config import validate
from grade.errors import GradeError

SERVED = {"engine": "vllm", "url": "http://127.0.0.1:1"}

WRONG = {
    "no address": ({"rollout": {"engine": "vllm"}}, "needs the server's address: set rollout.url"),
    "no scheme": ({"rollout": {**SERVED, "url": "127.0.0.1:8000"}}, "rollout.url is 127.0.0.1:8000: it must be like"),
    "a port": (
        {"rollout": {**SERVED, "url": "http://host:99999"}},
        "rollout.url is http://host:99999: it must be like",
    ),
    **{
        f"no address {url}": (
            {"rollout": {**SERVED, "url": url}},
            "rollout.url is .*: it must be like http://127.0.0.1",
        )
        for url in (
            "",
            "http://",
            "http://[::1",
            "http://a b:80",
            "http://h\u00f6:80",
            "http://h:80/\u00f6",
            "http://..:80",
        )
    },
    "a key": ({"rollout": {**SERVED, "url": "http://me:secret@host"}}, "into the environment variable VLLM_API_KEY"),
    "two sources": ({"rollout": {**SERVED, "source": "ids"}}, "rollout.engine=vllm and rollout.source=ids exclude"),
    "compiled": ({"rollout": {**SERVED, "compile": True}}, "and rollout.compile=true exclude each other"),
    "whole models": (
        {"rollout": SERVED, "model": {"finetuning": "full"}, "method": {"estimator": "rao"}},
        "model.finetuning=full exclude each other: the server is sent an adapter",
    ),
    "soft tokens": (
        {"rollout": SERVED, "method": {"name": "grade"}},
        "rollout.engine gives token ids, but method.name=grade",
    ),
    "the noise": ({"rollout": SERVED}, "rollout.engine gives token ids, but .*estimator=gumbel needs the noise"),
    "weights of nothing": (
        {"rollout": {**SERVED, "importance_cap": 2.0}, "method": {"estimator": "rao"}},
        "rollout.importance_cap weights the loss of policy gradients",
    ),
    "an address here": (
        {"rollout": {"url": "http://127.0.0.1:8000"}},
        "rollout.url is http://127.0.0.1:8000, but rollout.engine is here",
    ),
    "lag here": ({"rollout": {"max_lag": 1}}, "rollout.max_lag is 1, but rollout.engine is here"),
    "weights here": ({"rollout": {"importance_cap": 2.0}}, "rollout.importance_cap is 2.0, but rollout.engine is here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_work_are_refused(tiny_config, case):  # noqa: F811
    settings, message = WRONG[case]
    with pytest.raises(GradeError, match=message) as refusal:
        validate(changed(tiny_config, **settings))
    assert "secret" not in str(refusal.value)


def test_a_policy_gradient_and_the_other_rules_are_taken(tiny_config):  # noqa: F811
    for method in ({"estimator": "rao"}, {"estimator": "straight_through"}, {"name": "ppo"}, {"name": "reinforce"}):
        validate(changed(tiny_config, rollout=SERVED, method=method))
    validate(replace(tiny_config))
