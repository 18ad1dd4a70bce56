"""Names, tracker, retention and the pickle guard of checkpoint folders."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.metadata_guard import check_metadata
from megatron_ext.errors import UserError


def make_checkpoint(run_dir: Path, step: int) -> Path:
    target = folder.start_temporary(run_dir, step)
    (target / "shard").write_bytes(bytes([step % 256]) * 1000)
    folder.write_manifest(target, {"shard": folder.file_digest(target / "shard")})
    return folder.finish(run_dir, step)


def test_only_whole_folders_count(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 100)
    folder.start_temporary(tmp_path, 200)
    (folder.checkpoints_dir(tmp_path) / "iter_backup").mkdir()
    assert [step for step, _ in folder.complete_checkpoints(tmp_path)] == [100]
    assert (tmp_path / folder.TRACKER).read_text() == "100\n"
    make_checkpoint(tmp_path, 12345678)
    assert [step for step, _ in folder.complete_checkpoints(tmp_path)] == [100, 12345678]


def test_old_ones_go_and_leftovers_too(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    leftover = folder.start_temporary(tmp_path, 9)
    folder.remove_old(tmp_path, keep=2, newest_step=4)
    assert [step for step, _ in folder.complete_checkpoints(tmp_path)] == [3, 4]
    assert not leftover.exists()


def test_a_damaged_newer_one_does_not_push_out_the_good_one(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        make_checkpoint(tmp_path, step)
    # 300 was damaged, the run went on from 200 and saved 250.
    make_checkpoint(tmp_path, 250)
    folder.remove_old(tmp_path, keep=1, newest_step=250)
    assert [step for step, _ in folder.complete_checkpoints(tmp_path)] == [250, 300]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 7)
    path = make_checkpoint(tmp_path, 7)
    assert folder.damaged_files(path, ["shard"]) == []


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    shard = make_checkpoint(tmp_path, 5) / "shard"
    content = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    else:
        content[500] ^= 1
        shard.write_bytes(content if damage == "bit" else content[:400])
    (problem,) = folder.damaged_files(shard.parent, ["shard"])
    words = {"bit": "content differs", "cut": "400 bytes, expected 1,000", "gone": "missing"}
    assert words[damage] in problem
    assert str(shard) in problem


def test_manifest_must_stay_inside(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    folder.write_manifest(path, {"../../secret": {"bytes": 0, "sha256": ""}})
    with pytest.raises(UserError, match=r"not a file of this folder"):
        folder.read_manifest(path)


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_a_poisoned_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"posix\.system"):
        check_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


class _ByGetattr:
    """Written as Python 3.11.0 to 3.11.3 write a member of an enum: getattr(owner, name)."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (self.owner, self.name)


def test_members_of_enums_may_be_asked_for_by_name(tmp_path: Path) -> None:
    member = WriteItemType.TENSOR
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_ByGetattr(WriteItemType, member.name)))
    check_metadata(tmp_path)


@pytest.mark.parametrize(
    ("owner", "name"), [(WriteItemType, "__class__"), (Metadata, "__init__"), (dict, "clear")]
)
def test_nothing_else_may_be_asked_for_by_name(tmp_path: Path, owner: object, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_ByGetattr(owner, name)))
    with pytest.raises(UserError, match=rf"getattr\(.*{name}"):
        check_metadata(tmp_path)


def test_unrestricted_loading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        check_metadata(tmp_path)
