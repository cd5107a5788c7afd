"""All rules, the default first. A new rule is a file beside this one and a line here.

Every name of this file is a rule; :mod:`klora_compile.rules.lookup` finds rules by their names on
the command line.
"""

# isort: off
from klora_compile.rules.klora import Klora as Klora
from klora_compile.rules.est import Est as Est
from klora_compile.rules.np_lora import NpLora as NpLora
from klora_compile.rules.np_klora import NpKlora as NpKlora
from klora_compile.rules.soft import Soft as Soft
from klora_compile.rules.direct import Direct as Direct
from klora_compile.rules.level import Level as Level
from klora_compile.rules.auto_strength import AutoStrength as AutoStrength
from klora_compile.rules.switch import Switch as Switch
from klora_compile.rules.phases import Phases as Phases
from klora_compile.rules.groups import Groups as Groups
from klora_compile.rules.ties import Ties as Ties
from klora_compile.rules.dare import Dare as Dare
from klora_compile.rules.della import Della as Della
from klora_compile.rules.auto import Auto as Auto
from klora_compile.rules.ssr import Ssr as Ssr
from klora_compile.rules.fit import Fitted as Fitted
