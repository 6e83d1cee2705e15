"""Checkpoints: exact to the bit, verified, refused where they do not fit, kept by policy."""

import json
import zlib
from typing import NamedTuple

import problem
import pytest
import torch
from torch import Tensor

import fxtrain as fx
from fxtrain import testing, tree


def a_state(**slots):
    return problem.start().replace(slots=slots)


class Memory(NamedTuple):
    count: Tensor
    inner: dict


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


class TestExact:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_comes_back_to_the_bit(self, tmp_path, dtype):
        raw = torch.randint(0, 256, (7 * 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        leaf = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
        state = a_state(x=leaf)
        back = fx.restore(fx.save(tmp_path / "c", state), like=a_state(x=torch.zeros_like(leaf))).slots["x"]
        assert back.dtype == dtype
        assert torch.equal(back.view(torch.uint8), leaf.view(torch.uint8))

    @pytest.mark.parametrize(
        "leaf",
        [
            torch.tensor(3.5),
            torch.zeros(0, 4),
            torch.arange(12.0).reshape(3, 4).T,
            torch.arange(10)[::3],
            torch.tensor([float("nan"), float("inf"), -0.0]),
            torch.view_as_complex(torch.arange(6.0).reshape(3, 2)).conj(),
        ],
        ids=["0-d", "zero-size", "transposed", "strided", "non-finite", "conjugated"],
    )
    def test_every_layout_comes_back(self, tmp_path, leaf):
        back = fx.restore(fx.save(tmp_path / "c", a_state(x=leaf)), like=a_state(x=leaf)).slots["x"]
        assert torch.equal(torch.nan_to_num(back), torch.nan_to_num(leaf.resolve_conj()))
        assert back.shape == leaf.shape

    def test_dotted_integer_and_nested_keys_stay_apart(self, tmp_path):
        slots = {
            "a.b": torch.tensor(1),
            "a": {"b": torch.tensor(2)},
            "n": {3: torch.tensor(3), 20: torch.tensor(4)},
        }
        state = a_state(**slots)
        testing.assert_equal(fx.restore(fx.save(tmp_path / "c", state), like=state), state, "keys")

    def test_a_whole_state_of_a_run(self, tmp_path):
        stopping = fx.callbacks.early_stopping("loss", patience=3, restore_best=True)
        state = fx.attach(problem.start(), stopping)
        testing.assert_equal(fx.restore(fx.save(tmp_path / "c", state), like=state), state, "a state")

    def test_restored_leaves_own_their_memory(self, tmp_path):
        state = a_state()
        back = fx.restore(fx.save(tmp_path / "c", state), like=state)
        storages = [leaf.untyped_storage().data_ptr() for leaf in tree.leaves(back)]
        assert len(set(storages)) == len(storages)


class TestVerified:
    def test_a_changed_byte_is_found_wherever_it_is(self, tmp_path):
        state = a_state()
        path = fx.save(tmp_path / "c", state)
        files = [file for file in path.rglob("*") if file.is_file() and "METADATA" not in file.name.upper()]
        for file in files:
            content = file.read_bytes()
            if not content or file.name.endswith(".txt"):
                continue
            middle = len(content) // 2
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            try:
                back = fx.restore(path, like=state)
            except fx.CheckpointError:
                pass
            else:  # a byte that nothing depends on, such as padding
                testing.assert_equal(back, state, f"after a change of {file.name}")
            file.write_bytes(content)

    def test_a_damaged_manifest_says_so(self, tmp_path):
        path = fx.save(tmp_path / "c", a_state())
        manifest = path / "manifest.json"
        text = manifest.read_text()
        manifest.write_text(text.replace('"step": 0', '"step": 9'))
        with pytest.raises(fx.CheckpointError, match="its checksum is not that of its content"):
            fx.restore(path, like=a_state())
        manifest.write_text(text[:100])
        with pytest.raises(fx.CheckpointError, match="damaged"):
            fx.restore(path, like=a_state())

    def test_a_folder_that_is_no_checkpoint(self, tmp_path):
        with pytest.raises(fx.CheckpointError, match=r"is no checkpoint: there is no manifest\.json in it"):
            fx.restore(tmp_path, like=a_state())

    def test_never_overwrites(self, tmp_path):
        fx.save(tmp_path / "c", a_state())
        with pytest.raises(fx.CheckpointError, match="never overwritten"):
            fx.save(tmp_path / "c", a_state())

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(fx.CheckpointError, match="could not be written"):
            fx.save(tmp_path / "file" / "c", a_state())


class TestFit:
    def test_another_shape_dtype_or_name_is_refused_with_both_sides(self, tmp_path):
        path = fx.save(tmp_path / "c", a_state(x={"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}))
        like = a_state(x={"a": torch.zeros(5), "b": torch.zeros(3, dtype=torch.float64), "d": torch.zeros(1)})
        with pytest.raises(fx.CheckpointError) as caught:
            fx.restore(path, like=like)
        message = str(caught.value)
        assert "state.slots['x']['a']: wanted float32[5], and the checkpoint has float32[2]" in message
        assert "state.slots['x']['b']: wanted float64[3], and the checkpoint has float32[3]" in message
        assert "state.slots['x']['d']: wanted float32[1], and the checkpoint has none" in message
        assert "state.slots['x']['c']: the checkpoint has float32[1], and nothing is wanted" in message

    def test_another_model_is_refused(self, tmp_path):
        path = fx.save(tmp_path / "c", fx.init(torch.nn.Linear(2, 3)))
        with pytest.raises(fx.CheckpointError, match=r"state\.params\['weight'\]: wanted float32\[3, 5\]"):
            fx.restore(path, like=fx.init(torch.nn.Linear(5, 3)))

    def test_a_missing_slot_stays_and_an_extra_one_is_kept(self, tmp_path):
        memory = Memory(torch.tensor(4), {"w": torch.ones(2)})
        path = fx.save(tmp_path / "1", a_state(old=memory, plain={"x": [torch.tensor(1), torch.tensor(2)]}))
        back = fx.restore(path, like=a_state(new=torch.tensor(7)))
        assert int(back.slots["new"]) == 7
        assert int(back.slots["plain"]["x"][1]) == 2
        # The callback of the extra slot comes back two checkpoints later, and finds what it had.
        again = fx.restore(
            fx.save(tmp_path / "2", back), like=a_state(old=Memory(torch.tensor(0), {"w": torch.zeros(2)}))
        )
        testing.assert_equal(again.slots["old"], memory, "a slot that nobody claimed for a while")


def at(step, **metrics):
    return problem.start().replace(step=torch.tensor(step)), metrics


class TestCheckpointer:
    def saved(self, folder, steps, **policy):
        checkpoints = fx.checkpointer(folder, **policy)
        for step, loss in steps:
            checkpoints.save(*at(step)[:1], metrics={} if loss is None else {"loss": loss})
        return checkpoints

    @pytest.mark.parametrize(
        ("policy", "kept"),
        [
            ({"keep": 2}, [40, 50]),
            ({"keep": None}, [10, 20, 30, 40, 50]),
            ({"keep": 1, "keep_every": 20}, [20, 40, 50]),
            ({"keep": 1, "best": "loss"}, [20, 50]),
            ({"keep": 1, "best": "loss", "mode": "max"}, [30, 50]),
        ],
    )
    def test_keeps_by_policy(self, tmp_path, policy, kept):
        losses = [(10, 3.0), (20, 1.0), (30, 5.0), (40, None), (50, float("nan"))]
        checkpoints = self.saved(tmp_path / "run", losses, **policy)
        assert checkpoints.steps() == kept
        assert checkpoints.latest() == 50
        if "best" in policy:
            assert checkpoints.best() == (30 if policy.get("mode") == "max" else 20)
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
            p.name for p in (tmp_path / "run").glob("[0-9]*")
        )

    def test_after_going_back_a_later_save_is_not_swallowed(self, tmp_path):
        checkpoints = self.saved(tmp_path, [(10, None), (20, None), (15, None)])
        assert checkpoints.latest() == 15
        state = at(15)[0].replace(seed=torch.tensor(5))
        checkpoints.save(state)
        assert int(checkpoints.restore(problem.start(), step=15).seed) == 5
        assert checkpoints.steps() == [10, 15, 20] or checkpoints.steps() == [15, 20]

    def test_what_was_not_committed_is_not_listed(self, tmp_path):
        checkpoints = self.saved(tmp_path, [(10, None)])
        (tmp_path / ".unfinished-00000001-step-000000020-1").mkdir()
        (tmp_path / "999").mkdir()
        assert checkpoints.steps() == [10]

    def test_says_what_is_there(self, tmp_path):
        checkpoints = self.saved(tmp_path, [(10, None)])
        with pytest.raises(fx.CheckpointError, match=r"no step 11 in .*; the steps there are: 10"):
            checkpoints.restore(problem.start(), step=11)
        with pytest.raises(fx.CheckpointError, match=r"There is no checkpoint in .*; the steps there are: none"):
            fx.checkpointer(tmp_path / "empty").restore(problem.start())

    @pytest.mark.parametrize("arguments", [{"keep": 0}, {"keep_every": 0}, {"mode": "least"}])
    def test_validates(self, tmp_path, arguments):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
            fx.checkpointer(tmp_path, **arguments)

    def test_another_environment_is_told(self, tmp_path):
        checkpoints = self.saved(tmp_path, [(10, None)])
        (path,) = tmp_path.glob("[0-9]*")
        outer = json.loads((path / "manifest.json").read_text())
        outer["manifest"]["environment"]["threads"] = 64
        outer["crc32"] = zlib.crc32(json.dumps(outer["manifest"], sort_keys=True).encode())
        (path / "manifest.json").write_text(json.dumps(outer))
        with pytest.warns(UserWarning, match="may differ in the last bits: threads: 64 at the save, 1 now"):
            checkpoints.restore(problem.start())
