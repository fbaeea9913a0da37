"""The class `AdapterSums`: adapters made of other adapters: a weighted sum, a LoRA of any method, one task of many."""

from __future__ import annotations

from collections.abc import Sequence

from peftfx.adapters.adapter import UNKNOWN, Adapter
from peftfx.errors import PeftfxError
from peftfx.graph.contexts import fake_mode_of
from peftfx.model.by_name import AdaptersByName
from peftfx.options import LINEAR


class AdapterSums(AdaptersByName):
    """Adapters by name, with methods that make new adapters from them."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        *,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add a weighted sum of adapters as a new adapter, and make it the active one. As in HF PEFT.

        Args:
            adapters, weights: names of adapters of one method, and a factor for each; factors may be negative. A name
                may come twice.
            adapter_name: the name of the new adapter.
            combination_type: for LoRA, `cat` sums the effects exactly, and the sum's rank is the sum of the ranks.
                `svd` sums the effects and cuts the sum to a rank; it is LoRA's default, as in HF PEFT. `linear` sums
                the A and the B, each times the root of its adapter's weight, which is an approximation. `ties`,
                `dare_linear`, `dare_ties` and `magnitude_prune` prune A and B before that sum; with the ending `_svd`
                they prune the effects. For IA3 there is only `linear`.
            svd_full_matrices, svd_driver: ignored: they change how HF PEFT computes the same.
            svd_rank, svd_clamp, density, majority_sign_method: see `peftfx.contract.combination.Combination`.

        Examples:
            >>> adapted.add_adapter("second", peftfx.LoRA(r=8))
            >>> adapted.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", combination_type="cat")
        """
        from peftfx.adapters.combination import combine, tell_left_out
        from peftfx.contract.combination import Combination

        self.named.refuse(adapter_name)
        self.named.apart("an adapter is added")
        named = dict[str, Adapter]()
        for i, name in enumerate(adapters):  # an adapter may count more than once
            named[f"{name} ({i})" if name in named else name] = self.adapter(name)
        if combination_type is None:
            combination_type = next((rule.sums_by for a in named.values() for rule in a.rules), LINEAR)
        with fake_mode_of(self.base):
            how = Combination(
                combination_type=combination_type,
                svd_rank=svd_rank,
                svd_clamp=svd_clamp,
                density=density,
                majority_sign_method=majority_sign_method,
            )
            combined = combine(self.source, named, weights, how)
        tell_left_out(named)
        combined.named = frozenset().union(*(adapter.named for adapter in named.values()))
        self._install(adapter_name, combined)

    def convert_to_lora(self, adapter_name: str, rank: float, new_name: str = "lora") -> float:
        """Add a LoRA that has another adapter's effect on weights, and make it the active one.

        It also has the adapter's trained copies of modules (`modules_to_save`).

        Args:
            adapter_name: the name of an adapter of any method that acts on weights.
            rank: a whole number is the rank, and weights that have no such rank keep all of theirs; a float between 0
                and 1 is the share of each update's energy to keep.
            new_name: the name of the LoRA.

        Returns:
            The share of the energy of all updates, their squared singular values, that the LoRA keeps: 1 if nothing is
            cut.

        Examples:
            >>> adapted.add_adapter("loha", peftfx.LoHa(r=2, init_weights=False))
            >>> kept = adapted.convert_to_lora("loha", rank=4, new_name="lora")
        """
        from peftfx.adapters.lora_conversion import copies_beside, lora_of, updates_of

        self.named.refuse(new_name)
        adapter = self.adapter(adapter_name)
        updates, copies = updates_of(self.source, adapter), copies_beside(adapter)
        made, kept = lora_of(updates, rank, adapter.records, copies)
        made.named, made.start = adapter.named, UNKNOWN if adapter.start else ""
        self._install(new_name, made)
        return kept

    def tasks_of(self, adapter_name: str) -> int:
        """Return how many tasks an adapter tells apart in the rows of a batch; 0 if it treats all rows alike.

        Args:
            adapter_name: the adapter's name.
        """
        counts = (count for rule in self.adapter(adapter_name).rules for count in rule.inputs.values() if count > 1)
        return next(counts, 0)

    def take_task(self, adapter_name: str, task: int) -> None:
        """Keep only one task of an adapter that acts by `task_ids`, under the same name; see `split_tasks`.

        Args:
            adapter_name: the adapter's name.
            task: the task's number, from 0.

        Raises:
            PeftfxError: the adapter does not act by task, or has no task of this number.
        """
        from peftfx.adapters.combination import settled

        asked_name, count = self._tasks(adapter_name)
        if not 0 <= task < count:
            raise PeftfxError(f"the adapter has no task {task}", adapter_name, f"its tasks are 0 to {count - 1}")
        made, before = settled(self.adapter(adapter_name), {asked_name: task}), self.active
        self.named.apart("an adapter is replaced")
        self.remove(adapter_name)
        self._install(adapter_name, made)
        self.set_adapter(before)

    def _tasks(self, adapter_name: str) -> tuple[str, int]:
        """Return the name of the input that chooses an adapter's task, and the number of tasks."""
        asked = {name: count for rule in self.adapter(adapter_name).rules for name, count in rule.inputs.items()}
        if not asked:
            what = "this adapter does the same for every task"
            raise PeftfxError(what, adapter_name, "Poly and MultitaskPromptTuning have tasks")
        ((asked_name, count),) = asked.items()
        return asked_name, count

    def split_tasks(self, adapter_name: str) -> tuple[str, ...]:
        """Add an adapter for each task of one that acts by `task_ids`, and return their names.

        A new adapter does for all rows what `adapter_name` does for rows of one task. It shares that adapter's tensors
        and needs no `task_ids`. So it can be merged and exported as other adapters are, and an export with `batched=`
        can give each row a task. The names are `<adapter_name>_0` and so on. The active adapters do not change. HF PEFT
        has no such method.

        Args:
            adapter_name: the name of the adapter that acts by `task_ids`.

        Raises:
            PeftfxError: the adapter does not act by task, or an adapter has one of the new names already.

        Examples:
            >>> adapted = peftfx.transform(model, peftfx.Poly(r=4, n_tasks=2), adapter_name="tasks")
            >>> adapted.split_tasks("tasks")
            ('tasks_0', 'tasks_1')
        """
        from peftfx.adapters.combination import settled

        adapter = self.adapter(adapter_name)
        asked_name, count = self._tasks(adapter_name)
        names, before = tuple(f"{adapter_name}_{task}" for task in range(count)), self.active
        for name in names:
            self.named.refuse(name)
        self.named.apart("adapters are added")
        for task, name in enumerate(names):
            self._install(name, settled(adapter, {asked_name: task}))
        self.set_adapter(before)
        return names
