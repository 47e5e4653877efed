"""Roles that share GPUs: which are put together, and that Ray does so. The GPUs are Ray's bookkeeping alone."""

import pytest
import ray

from plumbline.errors import InputError
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.placement import shared_cards


def config(*, learners, engines, learner_gpus, engine_gpus, **ray_settings):
    return parse_config(
        {
            "name": "placement",
            "policy": {"device": "cpu"},
            "rollout": {"workers": engines, "gpus_per_worker": engine_gpus, "cpus_per_worker": 0.1},
            "learner": {"workers": learners, "gpus": learner_gpus, "cpus": 0.1},
            "reward": {"cpus_per_worker": 0.1},
            "ray": ray_settings,
        }
    )


@pytest.mark.parametrize(
    ("learners", "engines", "learner_gpus", "engine_gpus", "expected"),
    [
        (1, 1, 0, 0, []),  # no GPUs
        (2, 2, 1, 1, []),  # whole ones: Ray keeps them apart
        (1, 1, 0.6, 0.6, []),  # do not fit on one
        (1, 1, 0.25, 0.25, [0.5]),  # leaves half a GPU to others
        (2, 2, 0.5, 0.5, [1, 1]),
        (2, 2, 0.25, 0.25, [1, 1]),
        (2, 3, 0.5, 0.5, [1, 1, 1]),
        (3, 1, 0.5, 0.25, [1, 1, 1]),
        (2, 2, 0.5, 1, [1, 1]),  # learners alone must not meet on one
    ],
)
def test_what_is_booked_on_shared_gpus(learners, engines, learner_gpus, engine_gpus, expected):
    booked = shared_cards(
        config(learners=learners, engines=engines, learner_gpus=learner_gpus, engine_gpus=engine_gpus)
    )
    assert [bundle["GPU"] for bundle in booked] == expected


@pytest.fixture
def two_gpus():
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def gpus(workers):
    """Ray's numbers of the GPUs of these actors."""
    own = lambda actor: ray.get_gpu_ids()  # noqa: E731
    return [ids for (ids,) in ray.get([worker.__ray_call__.remote(own) for worker in workers])]


@pytest.mark.filterwarnings("ignore")
def test_learners_lie_apart_each_with_its_engine_also_after_a_replacement(two_gpus):
    run = config(learners=2, engines=2, learner_gpus=0.5, engine_gpus=0.5)
    with Roles.start(run) as roles:
        learners = gpus(roles.learners)
        assert sorted(learners) == [0, 1]
        assert gpus(roles.rollout) == learners
        roles.rollout.replace(1, roles.rollout[1], "a test")
        assert gpus(roles.rollout) == learners


def test_too_few_gpus_are_refused(two_gpus):
    run = config(learners=3, engines=3, learner_gpus=0.5, engine_gpus=0.5, start_timeout_seconds=3)
    with pytest.raises(InputError, match=r"did not have 3 x .*learner\.workers"):
        Roles.start(run)
