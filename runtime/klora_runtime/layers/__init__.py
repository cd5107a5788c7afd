"""Live weights: layers that follow the progress of sampling. Nothing here knows a pipeline.

A host is the program that samples. `pipeline/` is one; another host is a new room beside it and
needs no change here. A host calls, in this order:

1. ``targets.chosen_components(fusion, names)``, then it collects the modules of these components.
2. ``claim.refuse_claimed(models, self)`` and ``freezing.refuse_freezing(models.values())``, which
   check that the components are free.
3. ``targets.find_targets(models, fusion, host)``, which finds and checks every layer. ``host``
   (`host.Host`) describes what the program does to its modules.
4. ``choice.choose(mode, targets, weights)``, which returns a mode, with its memory allocated, and
   the reason for it.
5. ``live_fusion.LiveFusion(fusion, mode, weights)`` and its ``write()``, which changes the layers.
   The host puts ``claim.mark_of(self)`` into the ``vars`` of each component.
6. ``live.mode.check()`` when a run begins, and ``live.move(progress)`` before each of its steps,
   with a progress from ``artifact.timeline.progress_of_step``, or 1 at the end of the schedule.
7. ``live.set_weights``, ``live.enable`` and ``live.swap`` between runs.
8. ``live.release()``, which restores every parameter to the bit. The host then removes the mark.

If a call raises, nothing was changed.
"""
