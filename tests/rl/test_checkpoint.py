"""Checkpoints on disk without Ray: whole or invisible, written beside training, damaged ones passed over, failures told."""

import io
import resource
import shutil

import pytest
import torch
from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl import learner_state
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.checkpoint import CheckpointStore, damage
from plumbline.rl.config import parse_config
from plumbline.rl.files import sha256
from plumbline.rl.learner import Learner


class Files:
    """A writer that is done when it is told to be."""

    def __init__(self):
        self.done = True
        self.error = None

    def save(self, folder):
        self.folder = folder
        (folder / "policy").mkdir()
        (folder / "policy" / "model.bin").write_bytes(folder.name.encode() * 100)

    def written(self, *, wait):
        if self.error:
            raise self.error
        if not (self.done or wait):
            return None
        return {"policy/model.bin": sha256(self.folder / "policy" / "model.bin")}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_gets_its_name_when_it_is_whole(tmp_path):
    store, files = CheckpointStore(tmp_path, 2), Files()
    files.done = False
    state = {"a": [1]}
    store.begin(3, state, files)
    state["a"].append(2)  # by the training that goes on
    store.poll()
    assert store.paths() == []
    assert names(tmp_path)[0].startswith("partial-000003-")
    files.done = True
    store.poll()
    assert names(tmp_path) == ["step-000003"]
    assert store.newest == tmp_path / "step-000003"
    assert damage(store.newest) is None
    assert store.latest() == (store.newest, {"step": 3, "a": [1]})


def test_the_next_one_waits_for_the_one_before_and_the_last_k_stay(tmp_path):
    store, files = CheckpointStore(tmp_path, 2), Files()
    files.done = False
    with store:
        for step in (1, 2, 3):
            store.begin(step, {}, files)
        assert [path.name for path in store.paths()] == ["step-000001", "step-000002"]
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_what_a_killed_process_left_goes(tmp_path):
    (tmp_path / "partial-000009-dead" / "policy").mkdir(parents=True)
    store = CheckpointStore(tmp_path, 1)
    store.begin(1, {}, Files())
    store.poll(wait=True)
    assert names(tmp_path) == ["step-000001"]


def test_a_failed_write_is_told_and_the_one_before_stays(tmp_path):
    store, files = CheckpointStore(tmp_path, 2), Files()
    store.begin(1, {}, files)
    store.poll(wait=True)
    files.done = False
    store.begin(2, {}, files)
    files.error = OSError(28, "No space left on device")
    with pytest.raises(
        OSError, match=r"checkpoint of step 2 could not be written \(No space left on device\); earlier"
    ):
        store.poll()
    assert names(tmp_path) == ["step-000001"]
    store.poll(wait=True)  # told once


def test_an_error_in_training_waits_for_the_checkpoint_and_stays_the_error(tmp_path):
    def train(step, disk_error):
        files = Files()
        files.done = False
        with CheckpointStore(tmp_path, 2) as store:
            store.begin(step, {}, files)
            files.error = disk_error
            raise ValueError("training")

    with pytest.raises(ValueError, match="training"):
        train(1, None)
    assert names(tmp_path) == ["step-000001"]
    with pytest.raises(ValueError, match="training") as caught:
        train(2, OSError(28, "No space left on device"))
    assert "No space left" in caught.value.__notes__[0]
    assert names(tmp_path) == ["step-000001"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": (flip, "has changed since it was written"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has changed since it was written"),
    "missing": (lambda path: path.unlink(), "is missing"),
}


def make(policy_path, **learner):
    tree = {
        "name": "x",
        "policy": {"path": policy_path, "device": "cpu"},
        "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 40, **learner},
    }
    return Learner(parse_config(tree), "cpu")


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(10, 290, (length,), generator=generator).tolist() for length in (3, 9, 5, 7)]
    return TrainingBatch([[11, 12]] * 4, rows, [[-5.7] * len(row) for row in rows], [1.0, 0.0, 0.5, 0.2], 2)


class Writer:
    """What Roles is for one learner in this process."""

    def __init__(self, learner):
        self.learner = learner

    def save(self, folder):
        self.saving = learner_state.Saving(self.learner, folder)

    def written(self, *, wait):
        return self.saving.written(wait=wait)


@pytest.fixture(scope="module")
def two_checkpoints(policy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    learner = make(policy_path)
    with CheckpointStore(folder, 2) as store:
        for step in (1, 2):
            learner.update(batch(step))
            store.begin(step, {}, Writer(learner))
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(
    "file", ["policy/model.safetensors", "learner/__0_0.distcp", "learner/.metadata", "learner.pt", "trainer.json"]
)
def test_every_damage_is_seen(file, kind, two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    spoil, said = DAMAGES[kind]
    spoil(tmp_path / "copy" / "step-000002" / file)
    out = io.StringIO()
    path, state = CheckpointStore(tmp_path / "copy", 2).latest(Console(file=out, width=400))
    assert (path.name, state["step"]) == ("step-000001", 1)
    assert f"{file} {said}" in out.getvalue()
    assert "using the one before" in out.getvalue()
    spoil(tmp_path / "copy" / "step-000001" / file)
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        CheckpointStore(tmp_path / "copy", 2).latest()


def test_a_damaged_one_does_not_push_out_whole_ones(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    flip(tmp_path / "copy" / "step-000002" / "learner.pt")
    (tmp_path / "copy" / "step-000002").rename(tmp_path / "copy" / "step-000009")
    store = CheckpointStore(tmp_path / "copy", 1)
    assert store.latest()[0].name == "step-000001"
    store.begin(2, {}, Files())
    store.poll(wait=True)
    assert names(tmp_path / "copy") == ["step-000002"]


def test_training_that_goes_on_changes_nothing_of_what_is_written(policy_path, tmp_path):
    learner = make(policy_path, clipping={"method": "adagc", "warmup_steps": 1})
    learner.update(batch(0))
    before = {name: tensor.clone() for name, tensor in learner_state.policy_weights(learner).items()}
    saving = learner_state.Saving(learner, tmp_path / "saved")
    for step in (1, 2, 3):
        learner.update(batch(step))
    saving.written(wait=True)
    other = make(policy_path, clipping={"method": "adagc", "warmup_steps": 1})
    learner_state.load(other, tmp_path / "saved")
    for name, tensor in learner_state.policy_weights(other).items():
        assert torch.equal(tensor, before[name]), name
    for step in (1, 2, 3):
        other.update(batch(step))
    for name, tensor in learner_state.policy_weights(other).items():
        assert torch.equal(tensor, learner_state.policy_weights(learner)[name]), name


@pytest.mark.parametrize("bytes_allowed", [2_000, 60_000])
def test_a_disk_that_refuses_ends_the_saving_with_its_error(bytes_allowed, policy_path, tmp_path):
    """The system refuses files beyond a size as it refuses those beyond a full disk: while they are written."""
    learner = make(policy_path)
    learner.update(batch(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def train():
        with CheckpointStore(tmp_path, 1) as store:
            store.begin(1, {}, Writer(learner))

    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"checkpoint of step 1 could not be written \(File too large\); earlier ones"
        ):
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
