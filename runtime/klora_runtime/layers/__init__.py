"""Live weights: layers that follow the progress of sampling. Knows no pipeline and no schedule.

A host is the program that samples. `pipeline/` is one; another stands beside it and changes
nothing in here. It calls, in this order:

1. ``targets.chosen_components(fusion, names)``, and collects the modules of these components.
2. ``claim.refuse_claimed(models, self)``, ``freezing.refuse_freezing(models.values())``: nothing
   else is on them.
3. ``targets.find_targets(models, fusion, host)``: every layer is found and checked. ``host`` tells
   what the program does around its modules (`host.Host`).
4. ``choice.choose(mode, targets, weights)``: a mode, and why; it has allocated what it needs.
5. ``live_fusion.LiveFusion(fusion, mode, weights)`` and its ``write()``, which changes the layers.
   ``claim.mark_of(self)`` goes into the ``vars`` of each component.
6. ``live.mode.check()`` when a run begins, ``live.move(progress)`` before each step of it, with the
   progress in [0, 1) of ``artifact.timeline.progress_of_step``.
7. ``live.set_weights``, ``live.enable``, ``live.swap`` between runs.
8. ``live.release()``: every parameter is given back to the bit. The mark goes.

Where one of these raises, nothing was changed.
"""
