"""Tuning: the page of ``klora tune``, on which one sees what each setting does.

    values of controls --Controls--> settings by name --trial_of--> Trial --Desk--> map, picture
         (layout)                     (as texts)                     |
                                                                     +--> commands, saved artifact

``layout``, ``events`` and ``page`` are the page, and alone import Gradio. The rest is what the page
shows and does. All pictures come from one :class:`~klora_compile.trying.studio.Studio`.
"""
