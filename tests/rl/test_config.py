"""The configuration tree: files, overrides, and what is refused."""

from pathlib import Path

import pytest

from plumbline.errors import InputError
from plumbline.rl.config import RunConfig, load_config, parse_config, valid_keys

CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).name


def test_overrides_are_typed(tmp_path):
    path = write(tmp_path, "name: x\nlearner: {learning_rate: 0.1}\n")
    config = load_config(
        path, ["learner.learning_rate=3e-5", "rollout.prompts_per_step=4", "data.levels=[1, 2]", "data.subset=null"]
    )
    assert config.learner.learning_rate == 3e-5
    assert config.rollout.prompts_per_step == 4
    assert config.data.levels == [1, 2]
    assert config.data.subset is None
    assert config.folder == Path("runs/x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.prompts_per_stepp=4",
            "unknown key 'rollout.prompts_per_stepp'; the nearest valid key is 'rollout.prompts_per_step'",
        ),
        ("learnig_rate=1", "nearest valid key is 'learner.learning_rate'"),
        ("rolout.workers=1", "unknown key 'rolout'; the nearest valid key is 'rollout'"),
        ("rollout.workers=0", "rollout.workers"),
        ("rollout.temperature=hot", "rollout.temperature"),
        ("rollout.top_p=0.9", "unknown key 'rollout.top_p'"),
        ("learner.minibatches=99", "learner.minibatches"),
        ("steps", "section.key=value"),
        ("name.x=1", "is a value, not a section"),
        ("name='../up'", "name"),
    ],
)
def test_bad_overrides_are_one_clear_line(tmp_path, override, message):
    path = write(tmp_path, "name: x\n")
    with pytest.raises(InputError) as error:
        load_config(path, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list", "name: [", "steps: 3"])
def test_bad_files_are_one_clear_line(tmp_path, text):
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_leaf_has_a_description():
    undocumented = []

    def walk(model, prefix):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                walk(field.annotation, f"{prefix}{name}.")
            elif not field.description and field.default is ...:
                undocumented.append(prefix + name)

    walk(RunConfig, "")
    assert undocumented == []
    assert "rollout.prompts_per_step" in valid_keys()


def test_engines_do_not_sleep_while_they_go_on():
    rollout = {"sleep_in_update": True, "max_staleness_steps": 1}
    with pytest.raises(InputError, match=r"sleep_in_update needs rollout\.max_staleness_steps 0"):
        parse_config({"name": "x", "rollout": rollout})
