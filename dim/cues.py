"""An estimate of which of the 21 dimensions a text in prose speaks of, from tell-tale words.

Coarse on purpose, and a lower bound: it tells a caption that covers hardly anything from one that
describes, and no more.
"""

from __future__ import annotations

import re

# Each word is a regular expression; an underscore stands for a space.
_WORDS = {
    "spatial relations": "left right above below behind under beside next_to between on_top centre "
    "center in_front around near across",
    "counts": r"one two three four five six several many few pair both single dozens? \d+",
    "relative sizes": "small(?:er)? large(?:r)? big tiny huge tall short wide narrow long medium",
    "colours": "red orange yellow green blue purple pink brown black white gr[ae]y beige "
    "gold(?:en)? silver turquoise cyan colou?r(?:s|ed|ful)?",
    "materials": "wood(?:en)? metal(?:lic)? glass stone brick concrete leather fabric cotton "
    "plastic paper ceramic steel marble wool(?:en)? denim",
    "shapes": r"round circles? circular squares? rectang\w+ triang\w+ oval curved cylindrical flat "
    "hexagons? pointed diamonds? stars?",
    "textures": "smooth rough shiny glossy matte textured? fluffy furry soft grainy rugged fuzzy",
    "human actions": "stand(?:s|ing) sit(?:s|ting) walk(?:s|ing) run(?:s|ning) hold(?:s|ing) "
    "look(?:s|ing) wear(?:s|ing) play(?:s|ing) rid(?:es|ing) eat(?:s|ing)",
    "interactions between objects": "rest(?:s|ing) lean(?:s|ing) hang(?:s|ing) touch(?:es|ing) "
    "cover(?:s|ed|ing) support(?:s|ed|ing) surround(?:s|ed|ing) attached",
    "facial expressions": "smil(?:es|ing) frown(?:s|ing) expression grin(?:s|ning) face gaze",
    "kind of scene": "indoors? outdoors? street room kitchen forest beach field city park table "
    "garden office landscape studio",
    "weather": "sunny cloud(?:s|y) rain(?:y|ing)? snow(?:y|ing)? fog(?:gy)? windy? sky stormy?",
    "lighting": "light(?:s|ing)? lit shadows? bright(?:ly)? dim(?:ly)? sun(?:light|lit)? "
    "glow(?:ing)?",
    "time of day": "day(?:light|time)? night morning evening noon afternoon dusk dawn sunset "
    "sunrise",
    "written text and signs": "text signs? letter(?:s|ing)? reads words? written labels? caption",
    "brands and logos": "logos? brand(?:s|ed)? trademark",
    "mood": "calm cheerful serene peaceful gloomy tense co[sz]y lively tranquil mood atmosphere "
    "playful festive",
    "artistic style": r"photograph(?:s|ic|y)? paint(?:ing|ed|erly) illustrat\w+ cartoon drawing "
    "style render(?:ing|ed)? watercolou?r realistic minimalist abstract",
    "cultural setting": r"traditional cultur\w+ european asian japanese chinese african american "
    r"indian histori\w+ modern rural urban",
    "depth and occlusion": r"foreground background distance part(?:ly|ially) hidden overlap\w* "
    "blurred depth",
    "perspective": "view(?:ed)? angle close-?up aerial perspective eye_level from_above from_below",
}
_PATTERNS = {
    name: re.compile(rf"\b(?:{words.replace(' ', '|').replace('_', ' ')})\b", re.IGNORECASE)
    for name, words in _WORDS.items()
}


def spoken_of(text: str) -> tuple[str, ...]:
    """The dimensions, named as in :data:`dim.caption.DIMENSIONS`, that ``text`` has a word of."""
    return tuple(name for name, pattern in _PATTERNS.items() if pattern.search(text))
