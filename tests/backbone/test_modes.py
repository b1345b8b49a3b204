from __future__ import annotations

import copy
import random
import time
from contextlib import ExitStack, suppress

import pytest
import torch
from torch import nn

from ptuning.backbone.modes import check_free, eval_mode, in_training
from ptuning.errors import InputError

from .. import tiny
from ..scaffold import together


def half_in_training() -> nn.Module:
    """A model whose first layer alone is in train mode and asks for gradients."""
    model = tiny.model().eval().requires_grad_(False)
    model.model.layers[0].train().requires_grad_(True)
    return model


def state_of(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_modules_are_in_eval_mode_and_get_their_own_modes_back() -> None:
    model = half_in_training()
    before = state_of(model)
    with suppress(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        _ = 1 / 0
    assert state_of(model) == before


@pytest.mark.parametrize("tunes", [False, True])
def test_parameters_ask_for_gradients_where_they_are_tuned_and_as_before_afterwards(
    tunes: bool,
) -> None:
    model = half_in_training()
    before = state_of(model)
    with in_training(model, tunes):
        assert all(p.requires_grad == tunes for p in model.parameters())
    assert state_of(model) == before


def test_users_may_leave_in_any_order() -> None:
    model = half_in_training()
    before = state_of(model)
    first, second = ExitStack(), ExitStack()
    for stack in (first, second):
        stack.enter_context(eval_mode(model))
        stack.enter_context(in_training(model, False))
    first.close()
    assert not any(any(flags) for flags in state_of(model))
    second.close()
    assert state_of(model) == before


def test_a_compiled_wrapper_is_the_same_user() -> None:
    model = tiny.model().train()
    wrapped = torch.compile(model, backend="eager")
    with eval_mode(wrapped):
        with eval_mode(model):
            pass
        assert not model.training
    assert model.training


def test_a_model_put_into_train_mode_meanwhile_is_not_so_for_who_comes_next() -> None:
    model = tiny.model().eval()
    with eval_mode(model):
        model.train()
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
    assert model.training


def test_copies_have_states_of_their_own() -> None:
    model = tiny.model().train()
    with eval_mode(model):
        twin = copy.deepcopy(model).train()
        with eval_mode(twin):
            pass
        assert twin.training and not model.training


def test_threads_never_see_another_mode() -> None:
    model = half_in_training()
    before = state_of(model)

    def come_and_go() -> None:
        chance = random.Random(1)
        for _ in range(150):
            with eval_mode(model), in_training(model, False):
                assert not any(any(flags) for flags in state_of(model))
                time.sleep(chance.random() / 5000)
                assert not any(any(flags) for flags in state_of(model))

    together(*[come_and_go] * 6)
    assert state_of(model) == before


def test_a_training_that_changes_the_weights_is_alone() -> None:
    model = tiny.model()
    with in_training(model, True):
        check_free(tiny.model(), False)
        for tunes in (False, True):
            with pytest.raises(InputError, match=r"its weights are being trained.*when the other"):
                check_free(model, tunes)
            with pytest.raises(InputError), in_training(model, tunes):
                pass
        assert all(p.requires_grad for p in model.parameters())
    with in_training(model, False):
        with pytest.raises(InputError, match=r"prompts are being trained on it.*second time"):
            check_free(model, True)
        with in_training(model, False):
            pass
    check_free(model, True)


def test_a_training_that_could_not_begin_leaves_the_model_to_others() -> None:
    with torch.inference_mode():
        model = tiny.model().requires_grad_(False)  # and so they stay
    with pytest.raises(RuntimeError, match="inference tensor"), in_training(model, True):
        raise AssertionError("it began")
    with in_training(model, False):
        check_free(model, False)
