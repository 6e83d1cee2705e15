"""Optimizer wrappers: chains, masks, partitions, skipped updates, injected hyperparameters, and precision."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from named_parameters import ONES, PARAMS, one
from torch._dynamo.testing import CompileCounter

from fxtrain import optim, schedules, tree

NAN = {**ONES, "body.bias": torch.tensor([float("nan"), 0.0])}


class TestChain:
    def test_chain_applies_transformations_in_order(self):
        a, b = optim.clip_by_global_norm(1.0), optim.sgd(0.1)
        first = one(a)
        torch.testing.assert_close(one(optim.chain(a, b)), one(b, first))

    def test_empty_chain_is_the_identity(self):
        assert one(optim.chain()) is ONES

    def test_chain_needs_params_only_if_a_member_does(self):
        tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1))
        updates, _ = tx.update(ONES, tx.init(PARAMS))
        assert tree.structure(updates) == tree.structure(ONES)

    @given(st.lists(st.sampled_from(["scale", "trace", "clip", "adam"]), max_size=5), st.integers(0, 5))
    def test_chain_is_associative(self, names, cut):
        parts = [
            {
                "scale": optim.scale(0.5),
                "trace": optim.trace(0.9),
                "clip": optim.clip_by_value(0.3),
                "adam": optim.scale_by_adam(),
            }[name]
            for name in names
        ]
        whole, nested = optim.chain(*parts), optim.chain(optim.chain(*parts[:cut]), optim.chain(*parts[cut:]))
        torch.testing.assert_close(one(whole), one(nested), rtol=0, atol=0)


class TestMasked:
    @pytest.mark.parametrize(
        "mask",
        [
            {"body.bias": False, "body.weight": False, "head.weight": True},
            lambda path, leaf: path == "head.weight",
            lambda path, leaf: path.split(".")[0] == "head",
        ],
    )
    def test_excluded_leaves_pass_unchanged(self, mask):
        tx = optim.masked(optim.chain(optim.scale(2.0), optim.trace(0.9)), mask)
        state = tx.init(PARAMS)
        assert [leaf.shape for leaf in tree.leaves(state)] == [(2, 2)]
        updates = one(tx)
        torch.testing.assert_close(updates, {**ONES, "head.weight": torch.full((2, 2), 2.0)})

    def test_predicates_get_dotted_paths_and_leaves(self):
        seen = []
        nested = {"a": {"b.c": torch.ones(2)}, "d": [torch.ones(3, 1), (torch.ones(()),)]}
        optim.masked(optim.identity(), lambda path, leaf: bool(seen.append((path, tuple(leaf.shape))))).init(nested)
        assert seen == [("a.b.c", (2,)), ("d.0", (3, 1)), ("d.1.0", ())]

    def test_full_mask_is_the_inner_and_empty_mask_the_identity(self):
        tx = optim.adam(0.1)
        torch.testing.assert_close(one(optim.masked(tx, lambda path, leaf: True)), one(tx))
        torch.testing.assert_close(one(optim.masked(tx, lambda path, leaf: False)), ONES)

    def test_masks_nest(self):
        inner = optim.masked(optim.scale(3.0), {name: name.endswith("weight") for name in PARAMS})
        updates = one(optim.masked(inner, lambda path, leaf: path.startswith("body")))
        assert {name: float(value.flatten()[0]) for name, value in updates.items()} == {
            "body.bias": 1.0,
            "body.weight": 3.0,
            "head.weight": 1.0,
        }

    def test_norms_cover_only_masked_leaves(self):
        updates = one(optim.masked(optim.clip_by_global_norm(1.0), lambda path, leaf: leaf.ndim == 1))
        assert float(updates["body.bias"].norm()) == pytest.approx(1.0)
        torch.testing.assert_close(updates["body.weight"], ONES["body.weight"])


class TestPartition:
    def test_leaves_are_updated_by_their_label(self):
        tx = optim.partition(
            {"head": optim.sgd(1.0), "body": optim.sgd(0.1), "frozen": optim.set_to_zero()},
            {"body.bias": "frozen", "body.weight": "body", "head.weight": "head"},
        )
        rates = {name: -float(value.flatten()[0]) for name, value in one(tx).items()}
        assert rates == {"body.bias": 0.0, "body.weight": pytest.approx(0.1), "head.weight": 1.0}

    def test_each_label_has_optimizer_state_for_its_leaves(self):
        tx = optim.partition(
            {"adam": optim.adam(0.1), "sgd": optim.sgd(0.1)},
            lambda path, leaf: "adam" if leaf.ndim == 1 else "sgd",
        )
        states = tx.init(PARAMS).inner_states
        assert len(tree.leaves(states["adam"])) == 3
        assert len(tree.leaves(states["sgd"])) == 0

    def test_muon_mask_assigns_embeddings_to_adamw(self):
        tx = optim.muon(0.1, muon_mask={"body.bias": False, "body.weight": True, "head.weight": False})
        states = tx.init(PARAMS).inner_states
        assert [tree.leaves(states[label][0].mu)[0].shape for label in ("muon", "adam")] == [(2, 2), (2,)]
        assert len(tree.leaves(states["adam"][0].mu)) == 2


class TestApplyIfFinite:
    def test_non_finite_updates_are_skipped_up_to_the_limit(self):
        tx = optim.apply_if_finite(optim.sgd(0.1, momentum=0.9), max_consecutive=2)
        state = tx.init(PARAMS)
        _, state = tx.update(ONES, state, PARAMS)
        kept = state.inner_state
        for bad in (1, 2):
            updates, state = tx.update(NAN, state, PARAMS)
            torch.testing.assert_close(updates, tree.zeros_like(ONES))
            torch.testing.assert_close(state.inner_state, kept)
            assert (int(state.notfinite_count), int(state.total_notfinite)) == (bad, bad)
        updates, given_in = tx.update(NAN, state, PARAMS)
        assert updates["body.bias"].isnan().any()
        assert (int(given_in.notfinite_count), int(given_in.total_notfinite)) == (3, 3)
        updates, state = tx.update(ONES, state, PARAMS)
        assert (int(state.notfinite_count), int(state.total_notfinite)) == (0, 2)
        assert updates["body.bias"].isfinite().all()

    def test_vmapped_members_are_skipped_individually(self):
        tx = optim.apply_if_finite(optim.sgd(1.0), max_consecutive=5)
        grads = torch.tensor([1.0, float("inf"), 2.0])
        updates, state = torch.func.vmap(tx.update)(grads, torch.func.vmap(tx.init)(grads))
        assert updates.tolist() == [-1.0, 0.0, -2.0]
        assert state.notfinite_count.tolist() == [0, 1, 0]


class TestInjectHyperparams:
    def test_injected_updates_match_the_factory(self):
        given = {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.1}
        torch.testing.assert_close(one(optim.inject_hyperparams(optim.adamw)(**given)), one(optim.adamw(**given)))

    def test_only_given_hyperparameters_are_injected(self):
        tx = optim.inject_hyperparams(optim.muon)(
            0.1, ns_steps=3, muon_mask=lambda path, leaf: leaf.ndim == 2, adam_b1=0.8, weight_decay=torch.tensor(0.1)
        )
        state = tx.init(PARAMS)
        assert sorted(state.hyperparams) == ["adam_b1", "learning_rate", "weight_decay"]
        assert {(v.dtype, v.shape) for v in state.hyperparams.values()} == {(torch.float32, torch.Size([]))}

    def test_hyperparameters_have_parameter_precision(self):
        params = tree.map(torch.Tensor.double, PARAMS)
        tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
        assert float(tx.init(params).hyperparams["learning_rate"]) == 0.1
        torch.testing.assert_close(one(tx, params, params), one(optim.sgd(0.1), params, params), rtol=0, atol=0)

    def test_decay_rate_beyond_single_precision_is_rejected(self):
        inject = optim.inject_hyperparams
        near = inject(optim.adam)(learning_rate=0.1, b2=0.999999)
        with pytest.raises(ValueError, match=r"expected b2 to be a decay rate .*got 0\.999999.*functools\.partial"):
            near.init(PARAMS)
        near.init(tree.map(torch.Tensor.double, PARAMS))
        state = inject(optim.adam)(learning_rate=0.1, b2=0.999).init(PARAMS)
        with pytest.raises(ValueError, match=r"expected b2 to be a decay rate .*got 0\.999999"):
            optim.set_hyperparams(state, b2=0.999999)
        optim.set_hyperparams(state, learning_rate=0.9999999999999999)
        outside = inject(functools.partial(optim.adam, b2=0.999999))(learning_rate=0.1)
        assert sorted(outside.init(PARAMS).hyperparams) == ["learning_rate"]
        torch.testing.assert_close(one(outside), one(optim.adam(0.1, b2=0.999999)))

    def test_hyperparameter_tensors_are_copied(self):
        rate = torch.tensor(0.1)
        state = optim.inject_hyperparams(optim.sgd)(learning_rate=rate).init(PARAMS)
        assert state.hyperparams["learning_rate"].data_ptr() != rate.data_ptr()

    def test_scheduled_values_are_stored_and_applied(self):
        schedule = schedules.linear(1.0, 0.0, transition_steps=2)
        tx = optim.inject_hyperparams(optim.sgd)(learning_rate=schedule)
        state, rates, shown = tx.init(PARAMS), [], []
        for _ in range(3):
            updates, state = tx.update(ONES, state, PARAMS)
            rates.append(-float(updates["body.bias"][0]))
            shown.append(float(optim.get_hyperparams(state)["learning_rate"]))
        assert rates == shown == [1.0, 0.5, 0.0]

    def test_set_hyperparams_reaches_nested_states(self):
        inject = optim.inject_hyperparams
        tx = optim.chain(
            optim.clip_by_global_norm(1.0),
            optim.apply_if_finite(
                optim.partition(
                    {"a": inject(optim.sgd)(learning_rate=1.0), "b": inject(optim.adamw)(learning_rate=0.1, b1=0.8)},
                    lambda path, leaf: "a" if leaf.ndim == 1 else "b",
                ),
                max_consecutive=3,
            ),
        )
        state = tx.init(PARAMS)
        new = optim.set_hyperparams(state, learning_rate=lambda rate: rate / 10, b1=0.5)
        assert {name: round(float(value), 6) for name, value in optim.get_hyperparams(new).items()} == {
            "[1][2][0]['a'].learning_rate": 0.1,
            "[1][2][0]['b'].learning_rate": 0.01,
            "b1": 0.5,
        }
        assert float(optim.get_hyperparams(state)["b1"]) == pytest.approx(0.8)  # the input state is unchanged
        assert tree.structure(new) == tree.structure(state)
        assert len({leaf.data_ptr() for leaf in tree.leaves(new)}) == len(tree.leaves(new))

    def test_set_hyperparams_works_on_vmapped_states(self):
        tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
        states = torch.func.vmap(tx.init)(torch.ones(3))
        together = optim.set_hyperparams(states, learning_rate=0.5)
        assert together.hyperparams["learning_rate"].tolist() == [0.5, 0.5, 0.5]
        single = torch.func.vmap(lambda s, rate: optim.set_hyperparams(s, learning_rate=rate))(
            states, torch.tensor([1.0, 2.0, 3.0])
        )
        updates, _ = torch.func.vmap(tx.update)(torch.ones(3), single)
        assert updates.tolist() == [-1.0, -2.0, -3.0]

    def test_new_value_does_not_recompile(self):
        torch._dynamo.reset()
        tx = optim.inject_hyperparams(optim.adamw)(learning_rate=0.1, weight_decay=0.1)
        counter = CompileCounter()
        compiled = torch.compile(tx.update, fullgraph=True, backend=counter)
        state = tx.init(PARAMS)
        for step in range(4):
            state = optim.set_hyperparams(state, learning_rate=1.0 / (step + 1))
            expected, _ = tx.update(ONES, state, PARAMS)
            updates, state = compiled(ONES, state, PARAMS)
            torch.testing.assert_close(updates, expected)
        assert counter.frame_count == 1

    def test_set_hyperparams_works_inside_a_compiled_function(self):
        torch._dynamo.reset()
        tx = optim.chain(optim.inject_hyperparams(optim.sgd)(learning_rate=0.1))

        def halve(state, loss):
            return optim.set_hyperparams(state, learning_rate=lambda rate: torch.where(loss > 1.0, rate / 2, rate))

        compiled = torch.compile(halve, fullgraph=True, backend="eager")
        for loss, rate in ((0.5, 0.1), (2.0, 0.05)):
            state = compiled(tx.init(PARAMS), torch.tensor(loss))
            assert float(optim.get_hyperparams(state)["learning_rate"]) == pytest.approx(rate)

    def test_advancing_schedule_does_not_recompile(self):
        torch._dynamo.reset()
        tx = optim.adamw(schedules.warmup_cosine_decay(0.0, 1.0, warmup_steps=2, decay_steps=9))
        counter = CompileCounter()
        compiled = torch.compile(tx.update, fullgraph=True, backend=counter)
        state = tx.init(PARAMS)
        for _ in range(12):
            _, state = compiled(ONES, state, PARAMS)
        assert counter.frame_count == 1
        assert int(state[2].count) == 12


class TestPrecision:
    def test_second_moments_do_not_stall_in_bfloat16(self):
        # In bfloat16 the second moment stops growing once an increment is below half of its last bit.
        params = torch.ones(4, dtype=torch.bfloat16)
        tx = optim.scale_by_adam(b2=0.999)
        state = tx.init(params)
        for _ in range(2000):
            _, state = tx.update(params, state)
        assert state.nu.dtype == torch.float32
        assert float(state.nu[0]) == pytest.approx(1 - 0.999**2000, rel=1e-3)

    def test_small_gradients_survive_float16(self):
        grads = torch.tensor([1e-5, 0.0], dtype=torch.float16)  # its square and the default eps underflow
        updates = one(optim.adam(0.1), grads, grads)
        assert updates.dtype == torch.float16
        assert updates.tolist() == pytest.approx([-0.1, 0.0], rel=1e-2)

    def test_first_moments_have_the_given_dtype(self):
        params = {"real": torch.ones(2), "complex": torch.ones(2, dtype=torch.complex64)}
        state = optim.scale_by_adam(mu_dtype=torch.bfloat16).init(params)
        assert [leaf.dtype for leaf in tree.leaves(state.mu)] == [torch.complex64, torch.bfloat16]
        assert [leaf.dtype for leaf in tree.leaves(state.nu)] == [torch.float32, torch.float32]

    def test_double_learning_rate_does_not_promote_updates(self):
        for rate in (torch.tensor(0.1, dtype=torch.float64), lambda step: torch.tensor(0.1, dtype=torch.float64)):
            assert {leaf.dtype for leaf in one(optim.sgd(rate)).values()} == {torch.float32}
            scalar = torch.tensor(1.0)
            assert one(optim.sgd(rate), scalar, scalar).dtype == torch.float32

    def test_bias_correction_is_accurate_in_single_precision(self):
        params = torch.ones(1)
        tx = optim.scale_by_adam(b2=0.999999, eps=0.0)
        updates, _ = tx.update(params, tx.init(params))
        torch.testing.assert_close(updates, params, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("b2", [0.999, 0.9999, 0.999999])
    def test_radam_rectification_is_accurate_in_single_precision(self, b2):
        seen = {}
        for dtype in (torch.float32, torch.float64):
            params = torch.ones(3, dtype=dtype)
            tx = optim.scale_by_radam(b2=b2)
            state, seen[dtype] = tx.init(params), []
            for step in range(1, 40):
                updates, state = tx.update(params * step, state)
                seen[dtype].append(float(updates[0]))
        assert seen[torch.float32] == pytest.approx(seen[torch.float64], rel=1e-5, abs=0)

    @pytest.mark.parametrize("count", [10**7, 10**9, 10**10])
    def test_adafactor_decay_is_accurate_after_many_steps(self, count):
        params = torch.ones(3)
        tx = optim.scale_by_factored_rms()
        state = tx.init(params)
        state = state._replace(count=state.count + count)
        _, state = tx.update(params, state)
        assert state.v.tolist() == pytest.approx([(count + 1) ** -0.8] * 3, rel=1e-5, abs=0)
