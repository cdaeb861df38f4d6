"""The order of the hooks in one step, as step_watch.py states it, is Lightning's."""

import re

import pytest
from forking import forked, nano

from albert_ablate.training import step_watch
from albert_ablate.training.run import run

HOOKS = {
    "Recorder": ("on_train_batch_start", "on_train_batch_end"),
    "LanguageModel": ("on_train_batch_start", "training_step", "on_after_backward", "configure_gradient_clipping"),
}


@pytest.mark.process
def test_the_hooks_of_a_step_come_in_the_stated_order(text, tmp_path):
    def calls():
        from albert_ablate.training.module import LanguageModel
        from albert_ablate.training.recorder import Recorder

        seen = []
        for owner in (Recorder, LanguageModel):
            for name in (*HOOKS[owner.__name__], *(["optimizer_step"] if owner is LanguageModel else [])):
                plain = getattr(owner, name)

                def logged(self, *args, plain=plain, name=f"{owner.__name__}.{name}", **more):
                    seen.append(name)
                    return plain(self, *args, **more)

                setattr(owner, name, logged)
        run(nano(text, tmp_path, "data.accumulate=2", "budget.tokens=128"))
        return seen

    seen = forked(calls)
    stated = re.findall(r"^ +\d +(\w+\.\w+)", step_watch.__doc__, re.M)
    stated.remove("optimizer.step")  # torch's own
    each = [name for name in stated if name.split(".")[1] not in ("optimizer_step", "configure_gradient_clipping")]
    assert seen[: len(each) + len(stated)] == each + stated  # the first of two micro-batches, and the last
