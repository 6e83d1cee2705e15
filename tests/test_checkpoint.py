"""Single checkpoints: bitwise exactness, verification, mismatched states and partial restores."""

import warnings
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


# Every dtype of dense tensors. Quantized tensors also have a scale, so they are rejected.
DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not str(value).startswith(("torch.q", "torch.bits", "torch.int1"))
    }
    | {torch.int16},
    key=str,
)


def bits(leaf):
    return leaf.contiguous().as_strided((leaf.numel(),), (1,)).view(torch.uint8)


def alike(got, wanted):
    return got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(bits(got), bits(wanted))


class TestExact:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_is_restored_bitwise(self, tmp_path, dtype):
        raw = torch.randint(0, 256, (7 * 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        leaf = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
        state, like = a_state(x=leaf), a_state(x=torch.empty_like(leaf))
        assert alike(fx.restore(fx.save(tmp_path / "c", state), like=like).slots["x"], leaf)
        with fx.checkpointer(tmp_path / "run") as checkpoints:
            checkpoints.save(state)
            assert alike(checkpoints.restore(like).slots["x"], leaf)

    @pytest.mark.parametrize(
        "leaf",
        [
            torch.tensor(3.5),
            torch.zeros(0, 4),
            torch.arange(12.0).reshape(3, 4).T,
            torch.arange(10)[::3],
            torch.arange(2.0)[::2],
            torch.arange(3.0).expand(4, 3),
            torch.tensor([float("nan"), float("inf"), -0.0]),
            torch.view_as_complex(torch.arange(6.0).reshape(3, 2)).conj(),
            torch.view_as_complex(torch.arange(6.0).reshape(3, 2)).conj().imag,
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            torch.nn.Parameter(torch.ones(2)),
        ],
        ids=[
            *("0-d", "zero-size", "transposed", "strided", "one of two", "expanded", "non-finite"),
            *("conjugated", "negated", "channels last", "parameter"),
        ],
    )
    def test_every_layout_is_restored_bitwise(self, tmp_path, leaf):
        wanted = leaf.detach().resolve_conj().resolve_neg()
        back = fx.restore(fx.save(tmp_path / "c", a_state(x=leaf)), like=a_state(x=leaf)).slots["x"]
        assert alike(back, wanted)
        with fx.checkpointer(tmp_path / "run") as checkpoints:
            checkpoints.save(a_state(x=leaf))
            assert alike(checkpoints.restore(a_state(x=leaf)).slots["x"], wanted)

    @pytest.mark.parametrize("kind", ["quantized", "sparse", "nested", "meta"])
    def test_non_dense_tensor_is_rejected_with_path(self, tmp_path, kind):
        leaf = {
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "sparse": lambda: torch.eye(2).to_sparse(),
            "nested": lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
            "meta": lambda: torch.empty(2, device="meta"),
        }[kind]()
        with pytest.raises(
            fx.CheckpointError, match=rf"expected a dense tensor at state\.slots\['x'\], got a .*{kind}"
        ):
            fx.save(tmp_path / "c", a_state(x=leaf))
        assert not (tmp_path / "c").exists()

    def test_any_tree_of_tensors_is_restored(self, tmp_path):
        tree_ = {"a": [torch.ones(2), (torch.zeros(1), {})], 7: torch.tensor(True)}
        back = fx.restore(fx.save(tmp_path / "c", tree_), like=tree.zeros_like(tree_))
        testing.assert_equal(back, tree_, "a tree")
        assert tree.leaves(fx.restore(fx.save(tmp_path / "empty", {}), like={})) == []
        with pytest.raises(fx.CheckpointError, match=r"expected a dense tensor at tree\['a'\], got 1\.0"):
            fx.save(tmp_path / "d", {"a": 1.0})

    def test_tied_weights_and_empty_optimizer_are_restored(self, tmp_path):
        module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 3, bias=False)})
        module["head"].weight = module["embed"].weight
        state = fx.init(module, seed=1)
        testing.assert_equal(fx.restore(fx.save(tmp_path / "c", state), like=state), state, "a tied state")

    def test_dotted_integer_and_nested_keys_stay_distinct(self, tmp_path):
        slots = {
            "a.b": torch.tensor(1),
            "a": {"b": torch.tensor(2)},
            "n": {3: torch.tensor(3), 20: torch.tensor(4), (1, "x"): torch.tensor(5)},
            'it\'s a "name"]': torch.tensor(6),
        }
        state = a_state(**slots)
        testing.assert_equal(fx.restore(fx.save(tmp_path / "c", state), like=state), state, "keys")

    def test_state_with_callback_slots_is_restored(self, tmp_path):
        stopping = fx.callbacks.early_stopping("loss", patience=3)
        state = fx.attach(problem.start(), [stopping, fx.callbacks.restore_best("loss")])
        testing.assert_equal(fx.restore(fx.save(tmp_path / "c", state), like=state), state, "a state")

    def test_restored_leaves_own_their_memory(self, tmp_path):
        state = a_state()
        back = fx.restore(fx.save(tmp_path / "c", state), like=state)
        storages = [leaf.untyped_storage().data_ptr() for leaf in tree.leaves(back)]
        assert len(set(storages)) == len(storages)


class TestVerified:
    def test_every_flipped_bit_is_detected(self, tmp_path):
        like = {"a": torch.arange(3, dtype=torch.int16), "b": torch.zeros(2, dtype=torch.bool)}
        path = fx.save(tmp_path / "c", like)
        for file in path.iterdir():
            content = file.read_bytes()
            for bit in range(8 * len(content)):
                changed = bytearray(content)
                changed[bit // 8] ^= 1 << bit % 8
                file.write_bytes(changed)
                with pytest.raises(fx.checkpoint.DamagedError):
                    fx.restore(path, like=like)
            file.write_bytes(content)
        testing.assert_equal(fx.restore(path, like=like), like, "the undamaged one")

    @pytest.mark.parametrize("file", ["leaves.bin", "manifest.jsonl"])
    def test_truncated_extended_or_missing_file_is_detected(self, tmp_path, file):
        path = fx.save(tmp_path / "c", a_state())
        content = (path / file).read_bytes()
        for changed in (content[:-1], content[:10], b"", content + b"0", content + b"\n"):
            (path / file).write_bytes(changed)
            with pytest.raises(fx.checkpoint.DamagedError, match="damaged"):
                fx.restore(path, like=a_state())
        (path / file).unlink()
        with pytest.raises(fx.checkpoint.DamagedError, match=f"expected a checkpoint at .*, got no {file} in it"):
            fx.restore(path, like=a_state())

    def test_folder_without_manifest_is_rejected(self, tmp_path):
        with pytest.raises(fx.CheckpointError, match=r"expected a checkpoint at .*, got no manifest\.jsonl in it"):
            fx.restore(tmp_path, like=a_state())

    def test_save_never_overwrites(self, tmp_path):
        fx.save(tmp_path / "c", a_state())
        with pytest.raises(fx.CheckpointError, match="never overwritten"):
            fx.save(tmp_path / "c", a_state())

    def test_negative_step_is_rejected(self, tmp_path):
        state = a_state().replace(step=torch.tensor(-1))
        with pytest.raises(fx.CheckpointError, match="expected a state of step 0 or more, got step -1"):
            fx.save(tmp_path / "c", state)
        checkpoints = fx.checkpointer(tmp_path / "run")
        checkpoints.save(state)
        with pytest.raises(fx.CheckpointError, match="expected a state of step 0 or more, got step -1"):
            checkpoints.close()

    def test_unwritable_folder_is_rejected(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(fx.CheckpointError, match="expected a writable folder for the checkpoint"):
            fx.save(tmp_path / "file" / "c", a_state())


class TestMismatch:
    def test_mismatched_leaves_are_listed(self, tmp_path):
        path = fx.save(tmp_path / "c", a_state(x={"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}))
        like = a_state(x={"a": torch.zeros(5), "b": torch.zeros(3, dtype=torch.float64), "d": torch.zeros(1)})
        with pytest.raises(fx.CheckpointError) as caught:
            fx.restore(path, like=like)
        message = str(caught.value)
        assert "state.slots['x']['a']: expected float32[5], got float32[2]" in message
        assert "state.slots['x']['b']: expected float64[3], got float32[3]" in message
        assert "state.slots['x']['d']: expected float32[1], got none" in message
        assert "state.slots['x']['c']: expected none, got float32[1]" in message

    def test_different_model_is_rejected(self, tmp_path):
        path = fx.save(tmp_path / "c", fx.init(torch.nn.Linear(2, 3)))
        with pytest.raises(fx.CheckpointError, match=r"state\.params\['weight'\]: expected float32\[3, 5\]"):
            fx.restore(path, like=fx.init(torch.nn.Linear(5, 3)))

    def test_missing_slot_is_initialized_and_extra_slot_is_kept(self, tmp_path):
        memory = Memory(torch.tensor(4), {"w": torch.ones(2)})
        path = fx.save(tmp_path / "1", a_state(old=memory, plain={"x": [torch.tensor(1), torch.tensor(2)]}))
        with pytest.warns(
            UserWarning, match="'new' is not in the checkpoint and is initialized; .* 'old' is only in the checkpoint"
        ):
            back = fx.restore(path, like=a_state(new=torch.tensor(7)))
        assert int(back.slots["new"]) == 7
        assert int(back.slots["plain"]["x"][1]) == 2
        # The callback of the extra slot returns two checkpoints later and gets its state back.
        like = a_state(old=Memory(torch.tensor(0), {"w": torch.zeros(2)}))
        with pytest.warns(UserWarning, match="'new' is only in the checkpoint and is kept"):
            again = fx.restore(fx.save(tmp_path / "2", back), like=like)
        testing.assert_equal(again.slots["old"], memory, "a slot that nobody claimed for a while")

    def test_extra_slot_can_be_dropped(self, tmp_path):
        path = fx.save(tmp_path / "c", a_state(old=torch.tensor(1)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fx.restore(path, like=a_state(), extra="drop").slots == {}
        with pytest.raises(ValueError, match="expected extra to be one of 'keep', 'drop', got "):
            fx.restore(path, like=a_state(), extra="lose")


class TestPartialRestore:
    def test_parameters_only(self, tmp_path):
        path = fx.save(tmp_path / "c", fx.init(problem.module(), fx.optim.adam(0.1), seed=5))
        like = fx.init(problem.module(), fx.optim.sgd(0.1, momentum=0.9))
        back = fx.restore(path, like=like, where="state.params")
        testing.assert_equal(back.opt_state, like.opt_state, "the rest")
        assert int(back.seed) == 0
        testing.assert_equal(back.params, fx.init(problem.module()).params, "parameters")

    def test_several_parts_and_one_slot(self, tmp_path):
        saved = problem.start(seed=5).replace(slots={"mine": torch.tensor(3), "other": torch.tensor(4)})
        like = problem.start().replace(slots={"mine": torch.tensor(0), "other": torch.tensor(0)})
        path = fx.save(tmp_path / "c", saved)
        back = fx.restore(path, like=like, where=["state.seed", "state.slots['mine']"])
        assert (int(back.seed), int(back.slots["mine"]), int(back.slots["other"])) == (5, 3, 0)

    def test_renamed_paths(self, tmp_path):
        average = {name: value + 1 for name, value in problem.start().params.items()}
        path = fx.save(tmp_path / "c", problem.start().replace(slots={"average": {"params": average}}))
        where = {"state.params": "state.slots['average']['params']"}
        testing.assert_equal(fx.restore(path, like=problem.start(), where=where).params, average, "renamed")
        one = {"state.params['0.weight']": "state.slots['average']['params']['0.weight']"}
        back = fx.restore(path, like=problem.start(), where=one)
        assert torch.equal(back.params["0.weight"], average["0.weight"])
        assert torch.equal(back.params["0.bias"], problem.start().params["0.bias"])

    def test_tree_from_state(self, tmp_path):
        state = problem.start()
        path = fx.save(tmp_path / "c", state)
        params = fx.restore(path, like=tree.zeros_like(state.params), where={"tree": "state.params"})
        testing.assert_equal(params, state.params, "parameters as a tree")

    def test_unmatched_path_is_rejected(self, tmp_path):
        path = fx.save(tmp_path / "c", a_state())
        with pytest.raises(
            fx.CheckpointError, match=r"expected where='state\.param' to match a path of `like`, got only state"
        ):
            fx.restore(path, like=a_state(), where="state.param")
        with pytest.raises(
            fx.CheckpointError, match=r"where=\"state\.slots\['ema'\]\" to match a path of the checkpoint"
        ):
            fx.restore(path, like=a_state(), where={"state.params": "state.slots['ema']"})

    def test_mismatched_part_is_rejected(self, tmp_path):
        path = fx.save(tmp_path / "c", fx.init(torch.nn.Linear(2, 3)))
        with pytest.raises(fx.CheckpointError, match=r"weight'\]: expected float32\[3, 5\], got"):
            fx.restore(path, like=fx.init(torch.nn.Linear(5, 3)), where="state.params")


class TestAbstractState:
    def test_state_on_meta_device_is_sufficient(self, tmp_path):
        state = problem.start(seed=4)
        path = fx.save(tmp_path / "c", state)
        with torch.device("meta"):
            abstract = fx.init(problem.module(), problem.transform())
            back = fx.restore(path, like=abstract)
        testing.assert_equal(back, state, "restored like an abstract state")
        assert {leaf.device.type for leaf in tree.leaves(back)} == {"cpu"}
        result = fx.fit(back, problem.step(), problem.data(), steps=2)
        testing.assert_equal(
            result.state.params, fx.fit(state, problem.step(), problem.data(), steps=2).state.params, "trained on"
        )

    def test_state_moved_to_meta_device_is_sufficient(self, tmp_path):
        state = problem.start(seed=4)
        path = fx.save(tmp_path / "c", state)
        abstract = tree.map(lambda leaf: leaf.to("meta"), state)
        testing.assert_equal(fx.restore(path, like=abstract), state, "restored like an abstract state")

    def test_leaf_without_value_is_rejected(self, tmp_path):
        path = fx.save(tmp_path / "c", a_state())
        abstract = tree.map(lambda leaf: leaf.to("meta"), a_state(new=torch.ones(2)))
        with pytest.raises(fx.CheckpointError, match=r"expected values for state\.slots\['new'\], got none"):
            fx.restore(path, like=abstract)
