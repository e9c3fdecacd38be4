"""The plan of a search: trials whose values are drawn as they are taken, and the runs that confirm what it found."""

import json
import math
from collections import Counter
from typing import Any

import pandas as pd

from bench.analysis import searches
from bench.analysis.frames import best_first, frame, statuses
from bench.core.errors import UserError
from bench.core.runs import FAILURES
from bench.instruments import choose
from bench.priors.config import PriorConfig
from bench.tokenizers.config import Config

from .definition import Ablation, Range, Search, Space, StudyArguments, suggest
from .index import Index, Study, Trial, TrialState
from .kinds import PRIORS, TOKENIZERS, AnyConfig, endings
from .plan import PRIOR_SETTINGS, AblationPlan, Cell, Part, Plan, Row

LARGEST_POWER = 24  # K is at most 2 to this power


def make_plan(study: Ablation | Search, options: StudyArguments) -> "AblationPlan | SearchPlan":
    """The plan of ``study``. Raises UserError when one of its configs cannot work."""
    return (AblationPlan if isinstance(study, Ablation) else SearchPlan)(study, options)


class SearchPlan(Plan):
    """The plan of a Search: so many trials, whose values are drawn when they are taken."""

    kind = "search"

    def __init__(self, study: Search, options: StudyArguments):
        if options.timed:
            words = "would give each trial of a search other steps; match params or flops"
            raise UserError(f"--match {options.match} {words}")
        if choose(options.instruments) and not options.confirm:
            raise UserError("--instruments looks at what confirms a search; add --confirm N, or leave it out")
        for flag, field in PRIOR_SETTINGS.items():
            value = vars(options)[flag]
            if not options.prior and value != getattr(PriorConfig, field):
                words = f"--{flag.replace('_', '-')} is {value}, and no prior is trained"
                raise UserError(f"{words}; add --prior transformer and --metric gfid_vgg16, or leave it out")
        self.metric, self.rate = searches.goal(options.metric), searches.rate(options.metric)
        super().__init__(study, options, tied(study.space, options))
        for backbone in self.backbones if options.confirm and self.rate == searches.CODED else ():
            if not self._default(backbone):
                words = f"the preset's values of {backbone} are not in the space, and their trial would set the rate"
                raise UserError(f"{words} that --confirm compares at; take another preset or its own grid and K")
        if self._prior_names:  # of a run that another search gave up, nothing is known of what its codes would give
            self.final = self.final - {"pruned"}

    def _cells(self, backbone: str) -> list[Cell]:
        example = self.example(backbone)
        example.check()
        for name in self._prior_names:
            self._prior(name, example.run_id(), example.seed).check()
        return []

    def _trial(self, params: dict[str, Any], tokenizers: list[Config], role: str = "") -> Cell:
        """Each of ``tokenizers``, and right after it what trains the prior over its codes, if there is one."""
        configs: list[AnyConfig] = []
        for config in tokenizers:
            over = [self._prior(name, config.run_id(), config.seed).resolved() for name in self._prior_names]
            configs += [config, *over]
        return self._cell(params, configs, role)

    def header(self) -> dict[str, Any]:
        stored = {name: one._asdict() if isinstance(one, Range) else one for name, one in self.space.items()}
        return {**super().header(), "sweep": self.fields, "space": stored}

    @property
    def fields(self) -> tuple[str, ...]:
        """What a trial sets: what is drawn, and the K that its rate then asks for."""
        return (*self.space, *(("codebook_size",) if self.options.bits_per_image else ()))

    def configs(self, backbone: str, params: dict[str, Any]) -> list[Config]:
        if rate := self.options.bits_per_image:
            side = params.get("grid_size") or self.options.config(backbone, 0).grid_size
            params = {**params, "codebook_size": 2 ** (rate // side**2)}
        return super().configs(backbone, params)

    def _check_space(self) -> None:
        """Raises UserError where the study was begun with another space, whose trials have other distributions."""
        begun = self.store.study(self.name).get("space") if self.name in self.store.studies() else None
        before, now = (
            {name: json.dumps(choice) for name, choice in space.items()}  # in which 4 and 4.0 differ
            for space in (begun or {}, self.header()["space"])
        )
        for name in {**before, **now} if before else ():
            old, new = before.get(name, "no value"), now.get(name, "no value")
            if old != new:
                fix = "undo the change, or start again with another --results"
                raise UserError(f"study {self.name} began with {name} from {old} and now draws it from {new}; {fix}")

    def _fill(self, part: Part, index: Index, study: Study) -> int:
        if part.cells:
            return super()._fill(part, index, study)
        self._check_space()
        self.store.extend_study(self.name, self.header(), {})
        left = self.options.trials - index.ended(study)
        new = left - len(index.trials(study, TrialState.WAITING, TrialState.RUNNING))
        first = [] if index.trials(study) else [self._default(part.label)]
        values = (first + [{}] * new)[: max(0, new)]
        index.enqueue(study, [(params, None) for params in values], self.space)
        return max(0, left)

    def _default(self, backbone: str) -> dict[str, Any]:
        """The preset's own values of what is searched, which are tried first; none where they are not in the space."""
        preset = vars(self._preset(backbone))
        values = {name: preset[name] for name in self.space}
        inside = all(
            one.low <= values[name] <= one.high if isinstance(one, Range) else values[name] in one
            for name, one in self.space.items()
        )
        return values if inside else {}

    def _preset(self, backbone: str) -> Config:
        """The config that a search has to beat: the preset's, with its grid, or else the first, and the K that a rate
        asks for."""
        config = self.options.config(backbone, self.seeds[0])
        if rate := self.options.bits_per_image:
            grids = self.space.get("grid_size", (config.grid_size,))
            side = config.grid_size if config.grid_size in grids else grids[0]
            codes = {"grid_size": side, "codebook_size": 2 ** (rate // side**2)}
            config = self.options.config(backbone, self.seeds[0], **codes)
        return config.resolved()

    def followers(self) -> list[Part]:
        """Per backbone the best trial at the preset's rate (at coded rates: with no more bits than the trial of the
        preset's values) and the preset itself, on seeds that the search has not seen, scored on the test. Raises
        UserError where there is no such trial."""
        if not self.options.confirm:
            return []
        record = self.store.study(self.name)
        table = frame(map(self.store.named, record["runs"]))
        if self._prior_names:
            priors = (self.store.named(run_id, "priors") for run_id in record.get("priors", {}))
            table = searches.with_priors(table, frame(priors, PRIORS.frame))
        found = searches.trials(table, self.fields)
        return [self._confirming(name, found[found.backbone == name]) for name in self.backbones]

    def _confirming(self, backbone: str, found: pd.DataFrame) -> Part:
        preset = self._preset(backbone)
        default = {name: getattr(preset, name) for name in self.fields}
        best = self._best(backbone, found, preset, default)
        winner = {name: kind(best[name]) for name, kind in self._kinds(preset).items()}
        roles = {searches.WINNER: winner, searches.DEFAULT: default}
        if winner == default:
            roles = {searches.BOTH: winner}
        first = max(self.seeds) + 1
        cells = [
            self._trial({**values, "seed": seed}, [self._fresh(backbone, seed, values)], role)
            for seed in range(first, first + self.options.confirm)
            for role, values in roles.items()
        ]
        return self._part(TOKENIZERS, backbone, self.options.steps, cells, "-confirm", "confirmed")

    def _best(self, backbone: str, found: pd.DataFrame, preset: Config, default: dict[str, Any]) -> pd.Series:
        """Of the trials ``found`` the best at the preset's rate; at coded rates, of those that need no more than the
        trial of the preset's own values. Raises UserError where there is none."""
        bits = preset.tokens * math.log2(preset.codebook_size)
        if self.rate == searches.CODED:
            own = found[(found[[*default]] == pd.Series(default)).all(axis=1)]
            if own.empty:
                fix = "search on, or over a space that holds them"
                raise UserError(f"no trial of {backbone} has the preset's values, whose rate is the limit; {fix}")
            return best_first(found[found[self.rate] <= own[self.rate].iloc[0]], self.metric).iloc[0]
        best = searches.winners(found[found[searches.RATE] == bits], self.metric)
        if best.empty:
            fix = f"search on, or at that rate alone with --bits-per-image {bits:.0f}"
            raise UserError(f"no trial of {backbone} has the preset's {bits:.0f} bits per image to be confirmed; {fix}")
        return best.iloc[0]

    def _kinds(self, preset: Config) -> dict[str, type]:
        """Types of the values of ``fields``, which a frame may hold as others."""
        return {name: type(getattr(preset, name)) for name in self.fields}

    def _fresh(self, backbone: str, seed: int, values: dict[str, Any]) -> Config:
        return self.options.config(backbone, seed, **values, split="test").resolved()

    def allows(self, part: Part, index: Index, study: Study) -> bool:
        if part.cells:
            return True
        if self.options.timeout is not None and index.seconds(study) >= self.options.timeout:
            return False
        return index.ended(study) + len(index.trials(study, TrialState.RUNNING)) < self.options.trials

    def prunes(self, part: Part, trial: Trial) -> bool:
        return not part.cells and trial.should_prune()

    def claimed(self, part: Part, trial: Trial) -> Cell:
        """Draws the values of a trial that was taken, and records its runs."""
        if part.cells:
            return super().claimed(part, trial)
        params = suggest(trial, self.space)
        cell = self._trial(params, self.configs(part.label, params))
        self._list(part, [cell])
        return cell

    def failed(self) -> bool:
        """Whether a run failed, which a pruned one has not."""
        record = self.store.study(self.name)
        runs = [*map(self.store.named, {**record["runs"], **record.get("confirmed", {})})]
        runs += [self.store.named(run_id, "priors") for run_id in record.get("priors", {})]
        return bool({*endings(runs).values()} & {*FAILURES} - {"pruned"})

    def _words(self) -> list[str]:
        # a trial's value is the mean over its seeds
        seeds = [f"seeds={'+'.join(map(str, self.seeds))}"] if self.seeds != self.study.seeds else []
        rate = [f"bits_per_image={self.options.bits_per_image}"] if self.options.bits_per_image else []
        judged = [f"metric={'+'.join(self.options.metric)}", *(f"prior={name}" for name in self._prior_names)]
        return seeds + rate + (judged if self._prior_names else []) + super()._words()

    def _row(self, backbone: str) -> Row:
        runs = self.store.study(self.name)["runs"] if self.name in self.store.studies() else {}
        ours = [run_id for run_id, row in runs.items() if row["backbone"] == backbone]
        status = Counter(statuses(self.store.root / Config.SHELF, ours))
        ended = sum(status[name] for name in ("finished", *FAILURES))
        left = max(0, self.options.trials * len(self.seeds) - ended)
        return Row(self.options.trials, status, [self.example(backbone)] * left)

    def _priors_done(self) -> tuple[int, int]:
        record = self.store.study(self.name) if self.name in self.store.studies() else {}
        rows = {run_id: row for run_id, row in record.get("priors", {}).items() if "role" not in row}
        ours = [run_id for run_id, row in rows.items() if row["backbone"] in self.backbones]
        planned = self.options.trials * len(self.seeds) * len(self.backbones)
        return planned, statuses(self.store.root / PRIORS.config.SHELF, ours, PRIORS.frame).count("finished")


def tied(space: Space, options: StudyArguments) -> Space:
    """``space``, or of one rate those grids with which a K that is a power of two has it; K then follows. Raises
    UserError where no grid has."""
    rate = options.bits_per_image
    if rate is None:
        return space
    grids = space.get("grid_size", (options.grid_size,))
    fitting = tuple(side for side in grids if rate % side**2 == 0 and 1 <= rate // side**2 <= LARGEST_POWER)
    if not fitting:
        sides, tokens = ", ".join(map(str, grids)), " or ".join(str(side**2) for side in grids)
        raise UserError(
            f"bits_per_image is {rate}, which no grid of side {sides} has with K a power of two up to "
            f"2^{LARGEST_POWER}; give a multiple of {tokens}"
        )
    free = {name: choice for name, choice in space.items() if name not in ("grid_size", "codebook_size")}
    return free | ({"grid_size": fitting} if "grid_size" in space else {})
