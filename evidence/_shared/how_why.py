"""How and why questions, written for these recipes: knowledge words, a reference sentence and a passage each."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["QUESTIONS", "STARTS", "Question"]


class Question(NamedTuple):
    """A question with what is known about it.

    Attributes:
        text: The question.
        words: Five lemmas that a good answer uses.
        reference: One sentence that answers it.
        passage: Two or three sentences of an encyclopedia's kind.
    """

    text: str
    words: str
    reference: str
    passage: str


STARTS = [
    ("How do vaccines work? They", "vaccine", "antibody germ immunity protection cell"),
    ("Why is the sky blue? Because", "sky", "light sunlight air molecule wavelength"),
    ("How do plants make food? They", "plant", "sunlight leaf water sugar energy"),
    ("Why do leaves fall in autumn? Because", "leaf", "tree sunlight temperature winter chlorophyll"),
    ("How do airplanes fly? They", "airplane", "wing engine air lift pressure"),
    ("Why do we need sleep? Because", "sleep", "brain memory body rest energy"),
    ("How do bees make honey? They", "bee", "nectar flower hive wax enzyme"),
    ("Why is the ocean salty? Because", "ocean", "salt river rock mineral water"),
    ("How do earthquakes happen? They", "earthquake", "plate crust fault energy wave"),
    ("Why do cats purr? Because", "cat", "throat muscle comfort breath voice"),
    ("How do batteries store power? They", "battery", "electron chemical electrode charge energy"),
    ("Why does bread rise? Because", "bread", "yeast gas dough sugar bubble"),
]
"""Beginnings of answers: prompt, the entity it names, five knowledge words."""

QUESTIONS = [
    Question(
        "How do volcanoes erupt?",
        "magma gas pressure crust lava",
        "Magma rises through the crust because gas raises its pressure, and breaks out as lava.",
        "Volcanoes erupt when magma rises through the crust. Gas in the magma builds up pressure until lava and ash "
        "break out of a vent.",
    ),
    Question(
        "Why do tides rise and fall?",
        "moon gravity ocean bulge rotation",
        "The gravity of the moon pulls the ocean into bulges, through which the rotation of the earth carries us.",
        "Tides follow the gravity of the moon, which pulls the ocean into a bulge. The rotation of the earth carries "
        "coasts through one bulge and then the other.",
    ),
    Question(
        "How do kidneys clean the blood?",
        "filter waste urine water nephron",
        "Each kidney filters the blood through nephrons, which pass waste and water on as urine.",
        "Kidneys filter the blood in about a million nephrons each. Waste and surplus water leave the kidney as urine, "
        "while salt and sugar return to the blood.",
    ),
    Question(
        "Why does iron rust?",
        "oxygen water oxide electron moisture",
        "Iron gives electrons to oxygen where there is moisture, and becomes iron oxide.",
        "Iron rusts when oxygen and water reach its surface. The metal gives electrons to oxygen and turns into a "
        "brown oxide; moisture and salt speed this up.",
    ),
    Question(
        "How do magnets attract metal?",
        "field pole electron iron spin",
        "The spins of electrons make a field between the poles, and this field lines up the spins in iron.",
        "Magnets have a field that runs from pole to pole. The field comes from the spin of electrons, and it lines up "
        "the spins in iron so that the iron is pulled in.",
    ),
    Question(
        "Why do birds migrate?",
        "food winter season breeding climate",
        "Birds follow food and a mild climate in winter and return for the breeding season.",
        "Birds migrate because food grows scarce in winter. In spring they return north for the breeding season, when "
        "days are long and the climate is mild.",
    ),
    Question(
        "How do refrigerators cool food?",
        "coolant compressor heat coil gas",
        "A compressor drives a coolant through coils, where it takes up heat and turns to gas.",
        "Refrigerators move heat with a coolant. A compressor squeezes the gas, a coil outside gives off its heat, and "
        "a coil inside takes up heat from the food.",
    ),
    Question(
        "Why do we yawn?",
        "brain oxygen tiredness breath temperature",
        "A yawn is a deep breath that may cool the brain to the right temperature when tiredness sets in.",
        "Yawns are deep breaths that come with tiredness or boredom. A yawn may lower the temperature of the brain, "
        "and oxygen seems to matter less than was believed.",
    ),
    Question(
        "How do solar panels make electricity?",
        "sunlight silicon electron current cell",
        "Sunlight frees electrons in cells of silicon, and they flow as a current.",
        "Solar panels are made of cells of silicon. Sunlight frees electrons in the silicon, and a field inside the "
        "cell drives the electrons round as a current.",
    ),
    Question(
        "Why do onions make us cry?",
        "gas enzyme acid eye tear",
        "Cutting an onion lets an enzyme make a gas that becomes acid in the eye, and tears wash it out.",
        "Onions release an enzyme when they are cut. The enzyme makes a gas that turns to a weak acid in the eye, and "
        "tears wash the acid away.",
    ),
    Question(
        "How do glaciers move?",
        "ice weight gravity slope meltwater",
        "The weight of the ice lets it flow down a slope under gravity, sliding on meltwater.",
        "Glaciers are rivers of ice. Their weight bends the ice, gravity draws it down the slope, and meltwater at the "
        "bottom lets the glacier slide.",
    ),
    Question(
        "Why do stars twinkle?",
        "atmosphere light air refraction turbulence",
        "Turbulence in the air of the atmosphere changes the refraction of their light.",
        "Stars twinkle because their light crosses the atmosphere. Turbulence mixes warm air and cold air, and the "
        "refraction of the light changes from moment to moment.",
    ),
    Question(
        "How does soap remove grease?",
        "molecule oil water droplet tail",
        "The tail of a soap molecule holds on to oil while its head stays in water, which carries the droplets off.",
        "Soap has molecules with two ends. The tail goes into oil and the head stays in water, so that grease breaks "
        "into droplets that water carries away.",
    ),
    Question(
        "Why do our ears pop?",
        "pressure air eardrum tube altitude",
        "With altitude the pressure of the air changes, and a tube behind the eardrum lets it even out.",
        "Ears pop when the pressure on both sides of the eardrum becomes equal. A narrow tube lets air through, which "
        "a change of altitude or a dive makes necessary.",
    ),
    Question(
        "How do spiders make webs?",
        "silk gland protein thread spinneret",
        "Glands make silk out of protein, and the spinnerets draw it into thread.",
        "Spiders draw silk from a spinneret. Each gland holds liquid protein, which hardens into thread as the spider "
        "pulls it and fixes it to twigs.",
    ),
    Question(
        "Why do metals feel cold?",
        "heat conductor skin temperature hand",
        "A metal is a good conductor and takes heat from the skin of the hand, whatever its temperature.",
        "Metals feel cold because heat leaves the skin. A metal is a good conductor, so that the hand loses warmth to "
        "it even at the same temperature as wood.",
    ),
    Question(
        "How do lungs take in oxygen?",
        "air blood sac diaphragm capillary",
        "The diaphragm draws air into small sacs, from where oxygen passes into the blood of capillaries.",
        "Lungs fill with air when the diaphragm goes down. Oxygen passes from a tiny sac into a capillary, where red "
        "cells of the blood carry it away.",
    ),
    Question(
        "Why is bread better fresh?",
        "starch moisture crust crystal flavor",
        "With time the starch forms crystals, moisture moves to the crust and flavor is lost.",
        "Bread grows stale as its starch turns to crystals. Moisture moves from the crumb to the crust, and the flavor "
        "fades within a day or two.",
    ),
    Question(
        "How do compasses find north?",
        "needle field pole magnet earth",
        "The needle is a magnet that turns along the field of the earth towards the pole.",
        "Compasses hold a needle that can turn freely. The needle is a small magnet, and the field of the earth turns "
        "it until one end points to the pole.",
    ),
    Question(
        "Why do deserts get cold at night?",
        "cloud humidity heat sand air",
        "Without clouds or humidity the heat of the sand escapes through the dry air.",
        "Deserts lose heat quickly after sunset. Dry air and a sky without cloud let the warmth of the sand escape, "
        "and low humidity holds nothing back.",
    ),
    Question(
        "How do wind turbines make power?",
        "blade rotor generator wind shaft",
        "Wind turns the blades of a rotor, whose shaft drives a generator.",
        "Wind turbines have blades shaped like wings. The wind turns the rotor, the rotor turns a shaft, and the shaft "
        "drives a generator that makes electricity.",
    ),
    Question(
        "Why do teeth decay?",
        "bacteria sugar acid enamel plaque",
        "Bacteria in plaque turn sugar to acid, which dissolves enamel.",
        "Teeth decay when bacteria live in plaque. The bacteria turn sugar into acid, and the acid dissolves the "
        "enamel until a hole is left.",
    ),
    Question(
        "How do submarines dive?",
        "ballast tank water buoyancy pump",
        "Water let into the ballast tanks takes away buoyancy, and pumps drive it out again.",
        "Submarines dive by filling a ballast tank with water, which lowers their buoyancy. To rise, a pump or "
        "compressed air drives the water out of the tank.",
    ),
    Question(
        "Why do fireflies glow?",
        "enzyme oxygen light mate chemical",
        "An enzyme joins a chemical with oxygen, and the light calls a mate.",
        "Fireflies glow to find a mate. In their belly an enzyme joins a chemical with oxygen, and the energy leaves "
        "as cold light.",
    ),
    Question(
        "How do cameras take pictures?",
        "lens light sensor shutter image",
        "A lens throws the light of an image on a sensor while the shutter is open.",
        "Cameras gather light with a lens. The shutter opens for a moment, the image falls on a sensor, and each point "
        "of the sensor measures the light there.",
    ),
    Question(
        "Why does hair turn grey?",
        "pigment melanin follicle age cell",
        "With age the cells of a follicle make less of the pigment melanin.",
        "Hair gets its color from melanin, a pigment. With age the cells of each follicle make less melanin, and the "
        "hair grows without color.",
    ),
    Question(
        "How do rainbows form?",
        "raindrop sunlight refraction color angle",
        "Raindrops bend sunlight by refraction, each color at an angle of its own.",
        "Rainbows form when sunlight enters raindrops. Refraction bends each color by another angle, the back of the "
        "raindrop reflects it, and an arc of colors is seen.",
    ),
    Question(
        "Why do muscles get sore?",
        "fiber exercise tear inflammation repair",
        "Exercise leaves small tears in the fibers, and inflammation comes with their repair.",
        "Muscles get sore a day after exercise. Small tears in the fibers bring inflammation, and the repair of each "
        "fiber makes the muscle stronger.",
    ),
    Question(
        "How do bridges carry weight?",
        "beam arch cable load pillar",
        "Beams, arches or cables lead the load to pillars and banks.",
        "Bridges lead the load of traffic to the ground. A beam rests on a pillar at each end, an arch pushes the load "
        "sideways, and a cable hangs it from a tower.",
    ),
    Question(
        "Why do mirrors reflect light?",
        "silver surface electron glass image",
        "Electrons in the silver surface behind the glass send the light back as an image.",
        "Mirrors are sheets of glass with silver behind. The electrons of the silver surface send light back at the "
        "same angle, so that an image appears behind the glass.",
    ),
]
