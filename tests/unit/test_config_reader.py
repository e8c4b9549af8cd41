"""Owns the tests of where a config comes from: dicts, files, base64, arguments of a script."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepcore.config import add_config_arguments, load
from deepcore.errors import ConfigError

RAW: dict[str, Any] = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}}
LOOSE = """
{
  // a comment
  # another
  "train_batch_size": 8, /* and one more */
  "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95,],},},
}
"""


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    text = str(caught.value)
    assert text.splitlines()[-1].strip().startswith("do:")
    return text


def test_a_dict_is_copied_deeply() -> None:
    raw = load(RAW)
    assert raw == RAW
    raw["optimizer"]["params"]["betas"].append(1)
    assert RAW["optimizer"]["params"]["betas"] == [0.9, 0.95]


def test_objects_that_cannot_be_copied_are_shared() -> None:
    group = object()
    assert load({"tensor_parallel": {"tp": {"tp_group": group}}})["tensor_parallel"]["tp"]["tp_group"] is group


@pytest.mark.parametrize("text", [json.dumps(RAW), LOOSE, "\ufeff" + json.dumps(RAW)])
@pytest.mark.parametrize("form", [str, Path])
def test_files(tmp_path: Path, text: str, form: type) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    assert load(form(path)) == RAW


@pytest.mark.parametrize("text", [json.dumps(RAW), LOOSE, json.dumps({"key>>>???": "~~~\u00fc"})])
def test_base64(text: str) -> None:
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    assert load(encoded) == (RAW if "train" in text else {"key>>>???": "~~~\u00fc"})


def test_a_repeated_key_in_base64_is_an_error() -> None:
    assert '"a"' in message(base64.urlsafe_b64encode(b'{"a": 1, "a": 2}').decode())


@pytest.mark.parametrize(
    "text", ['{"a": 1, "b": {"zz": 1, "zz": 2}}', '{\n// hjson\n"a": 1,\n"b": {\n"zz": 1,\n"zz": 2,\n},\n}']
)
def test_a_repeated_key_is_named_in_json_and_hjson(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    found = message(path)
    assert "repeats a key" in found
    assert '"zz"' in found
    assert '"a"' not in found


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[1, 2]", "of type list"),
        ("3", "of type int"),
        ('{"a": [1, 2', "line 1, column 12"),
        ('{\n"a": }\n', "is not JSON"),
    ],
)
def test_files_that_hold_no_object(tmp_path: Path, text: str, phrase: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert phrase in message(path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "is not text" in message(path)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = message(str(tmp_path / "confg.json"))
    assert "does not exist; did you mean" in found
    assert "config.json" in found
    assert "is relative to" in found


@pytest.mark.parametrize("given", ["no_such_file.json", "YWJj", "", Path("no/such/folder/x.json")])
def test_a_string_that_is_neither_file_nor_base64(given: Any) -> None:
    found = message(given)
    assert "does not exist" in found or "is not a file" in found


def test_a_folder_is_not_a_config(tmp_path: Path) -> None:
    assert "not a file" in message(tmp_path)


@pytest.mark.parametrize("given", [3, [1], b"{}", SimpleNamespace(a=1)])
def test_other_types_are_refused(given: Any) -> None:
    assert type(given).__name__ in message(given)


def test_config_wins_over_its_older_name_which_counts_alone() -> None:
    assert load({"a": 1}, config_params={"b": 2}) == {"a": 1}
    assert load(None, config_params={"b": 2}) == {"b": 2}


@pytest.mark.parametrize("name", ["deepspeed_config", "deepcore_config", "deepscale_config"])
def test_arguments_of_a_script(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RAW))
    args = SimpleNamespace(**{name: str(path)})
    assert load(None, args=args) == RAW
    found = message(RAW, args=args)
    assert "given twice" in found
    assert f"args.{name}" in found
    assert "given twice" in message(None, config_params=RAW, args=args)


def test_two_arguments_of_a_script_are_one_too_many() -> None:
    found = message(None, args=SimpleNamespace(deepspeed_config="a.json", deepcore_config="b.json"))
    assert "--deepspeed_config a.json" in found


@pytest.mark.parametrize("args", [None, SimpleNamespace(), SimpleNamespace(deepspeed_config=None, deepspeed=True)])
def test_no_config_at_all(args: Any) -> None:
    assert "no config was given" in message(None, args=args)


def test_add_config_arguments_returns_the_parser_and_adds_the_three_options(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    assert add_config_arguments(parser) is parser
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "x.json"])
    assert args.deepspeed is True
    assert args.deepspeed_config == "x.json"
    path = tmp_path / "y.json"
    path.write_text("{}")
    assert load(None, args=parser.parse_args(["--deepcore_config", str(path)])) == {}
