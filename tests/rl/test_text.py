"""The tokens that end a completion."""

import json
import shutil

import pytest

from plumbline.errors import InputError
from plumbline.models.load import policy_folder
from plumbline.rl.text import Codec


@pytest.fixture
def folder(policy_path, tmp_path):
    return shutil.copytree(policy_folder(policy_path), tmp_path / "policy")


def test_end_tokens_of_the_folder_are_the_policys_too(folder, tmp_path):
    own = Codec(str(folder)).end_ids
    assert own == {Codec(str(folder)).tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    codec = Codec(str(folder))
    assert codec.end_ids == own | {5, 9}
    # A checkpoint of a run says so too: training and evaluation must end completions alike.
    again = shutil.copytree(folder, tmp_path / "again")
    (again / "generation_config.json").unlink()
    codec.save(again)
    assert Codec(str(again)).end_ids == codec.end_ids


def test_a_file_that_is_no_json_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json cannot be read"):
        Codec(str(folder))
