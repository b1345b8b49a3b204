"""One task of ``ptuning superglue``, part for part: from an earlier run, or done now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from ..errors import counted
from . import console

if TYPE_CHECKING:
    from ..experiments.ledger import Ledger
    from ..experiments.superglue.examples import Splits
    from ..experiments.superglue.options import SuperGlueOptions
    from ..experiments.superglue.tasks import SuperGlueTask
    from ..prompts.task import Task


class TaskRun:
    """The parts of one task: from an earlier run, or done now."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: SuperGlueTask,
        splits: Splits,
        options: SuperGlueOptions,
        ledger: Ledger,
        bar: console.PartsBar,
    ):
        from ..experiments.ledger import digest

        self.model, self.tokenizer, self.task, self.splits = model, tokenizer, task, splits
        self.options, self.ledger, self.bar = options, ledger, bar
        self._chosen_with = digest(splits.train, splits.dev)
        self._tested_with = digest(splits.train, splits.dev, splits.test)

    def baselines(self) -> dict[str, Any]:
        """The majority answer, and the manual templates by their dev figures."""
        from ..experiments.superglue.few_shot import baselines, score

        name = f"{self.task.name}-manual"
        known = self.ledger.get(name, self._chosen_with)
        result = known
        if result is None:
            self.bar.begin(f"{self.task.name}, manual templates")
            result = baselines(self.model, self.tokenizer, self.task, self.splits)
            self.ledger.put(name, self._chosen_with, result)
        line = f"manual, dev {console.percent(score(result['templates'][0]['dev']))}"
        self.bar.end(f"{self.task.name:>8}  {line}", known is None)
        return result

    def trained(self, seed: int, manual: dict[str, Any]) -> dict[str, Any]:
        """A seed's prompt, which is saved, and its dev figures; `manual` are the `baselines`."""
        from .. import distributed
        from ..experiments.superglue.few_shot import score, tuned

        name, folder = f"{self.task.name}-{seed}", self._folder(seed)
        known = self.ledger.get(name, self._chosen_with)
        if not distributed.from_main(lambda: (folder / "prompt.json").is_file()):
            known = None
        result = known
        if result is None:
            self.bar.begin(f"{self.task.name}, seed {seed}")
            options = replace(self.options, settings=replace(self.options.settings, seed=seed))
            result, prompt = tuned(
                self.model,
                self.tokenizer,
                self.task,
                self.splits,
                manual,
                options,
                self.bar.listener,
                self.ledger.running(name),
            )
            distributed.from_main(partial(prompt.save, folder, keep_encoder=False))
            result["seed"] = seed
            self.ledger.put(name, self._chosen_with, result)
        shown = console.percent(score(result["dev"]))
        self.bar.end(f"{self.task.name:>8}  seed {seed}  P-tuned, dev {shown}", known is None)
        return result

    def tested(self, manual: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
        """The task's figures: on test, or on dev where there is no test file."""
        from ..experiments.superglue.few_shot import majority, score

        rows = self.splits.test or self.splits.dev
        by_hand, biased = manual["templates"][0]["dev"], None
        measured = False
        if self.splits.test:
            found, measured = self._on_test(manual, [run["seed"] for run in runs])
            by_hand, biased = found["manual"], found.get("manual-biased")
            runs = [{**run, "test": found[str(run["seed"])]} for run in runs]
        part = "test" if self.splits.test else "dev"
        scores = [score(run[part]) for run in runs]
        line = (
            f"P-tuned, {counted(len(runs), 'seed')}, {part}, mean {console.percent(mean(scores))}"
        )
        self.bar.end(f"{self.task.name:>8}  {line}", measured)
        always = majority(self.task, manual, rows)
        return {
            "measured_on": part,
            "test_examples": len(self.splits.test),
            "majority": score(always),
            "best_manual": score(by_hand),
            "best_manual_biased": None if biased is None else score(biased),
            "best_manual_template": manual["templates"][0]["manual"],
            "mean": mean(scores),
            "deviation": stdev(scores) if len(scores) > 1 else 0.0,
            "metrics": {name: mean(run[part][name] for run in runs) for name in runs[0][part]},
            "seeds": runs,
            "baselines": {**manual, "majority": always, "manual": by_hand},
        }

    def _on_test(
        self, manual: dict[str, Any], seeds: list[int]
    ) -> tuple[dict[str, dict[str, float]], bool]:
        """Of the best manual template, with and without a bias, and each seed's prompt; and whether
        any was measured now.

        What they share is computed once.
        """
        from ..experiments.superglue.few_shot import best_by_hand, measured
        from ..prompts.prompt import Prompt

        asked: dict[str, Callable[[], Task]] = {"manual": partial(best_by_hand, self.task, manual)}
        if bias := manual.get("bias"):
            asked["manual-biased"] = partial(best_by_hand, self.task, manual, bias)
        for seed in seeds:
            asked[str(seed)] = partial(Prompt.load, self._folder(seed))
        parts = {part: f"{self.task.name}-{part}-test" for part in asked}
        found = {part: self.ledger.get(name, self._tested_with) for part, name in parts.items()}
        missing = [part for part, figures in found.items() if figures is None]
        if missing:
            self.bar.begin(f"{self.task.name}, test")
            tasks = [asked[part]() for part in missing]
            figures = measured(self.model, self.tokenizer, self.task, tasks, self.splits.test)
            for part, of_one in zip(missing, figures, strict=True):
                self.ledger.put(parts[part], self._tested_with, of_one)
                found[part] = of_one
        return {part: of_one for part, of_one in found.items() if of_one}, bool(missing)

    def _folder(self, seed: int) -> Path:
        return self.ledger.prompt(f"{self.task.name}-{seed}")
