"""What the demo scenes show: the objects by kind, the tile colours, the positions, and the words that name them.

One line per kind. An object is `word`, `word=emojibase label` where the two differ, and `word:stamp|stamp` where the
tuxpaint package has photo cut-outs of it (paths below its stamp folder, without `.png`).
"""

from dataclasses import dataclass

_TABLE = {
    "animal": (
        "animals/mammals",
        "monkey dog:dogs/dog fox:dogs/fox cat lion:cats/lion|cats/lion-2 tiger:cats/tiger|cats/tiger_sumatran "
        "horse:equines/horse zebra:equines/zebra cow:bovines/cow|bovines/cow_white pig:pig|pig_golden2 "
        "goat:bovines/goat|bovines/mountaingoat camel:camel/camel giraffe:giraffe elephant:elephant "
        "rabbit:rodents/rabbit|rodents/rabbit-2|rabbit_little bear:bears/bear|bears/european-bear koala "
        "gorilla:apes/gorilla deer:deer/deer|deer/wapiti",
    ),
    "bird": (
        "animals/birds",
        "rooster:rooster penguin:penguin|little-penguin|magellanic_penguin duck:duck|drake "
        "swan owl:owl flamingo:pink_flamingo peacock:peacock parrot:rainbow-lorikeet|adelaide-rosella turkey:turkey",
    ),
    "sea": (
        "animals",
        "whale:mammals/aquatic/whale dolphin:mammals/aquatic/dolphin fish:fish/dolphinfish|fish/moonwrasse shark "
        "octopus crab lobster:fish/lobster jellyfish turtle",
    ),
    "bug": (
        "animals/insects",
        "snail butterfly bee=honeybee:bee ladybug=lady_beetle spider scorpion ",
    ),
    "plant": (
        "plants",
        "rose:flowers/rose sunflower tulip hibiscus:flowers/chemparathi cactus mushroom:mushrooms/cep|mushrooms/cep-1 "
        "shamrock palm=palm_tree:trees/liberia-palm pine=evergreen_tree maple=maple_leaf bouquet",
    ),
    "fruit": (
        "food/fruit",
        "grapes:grapes watermelon tangerine:orange|mandarine lemon:lemon banana:banana pineapple:pineapple "
        "apple=red_apple:apple_red|apple_fuji pear:pear peach:Apricot_whole cherries:Cherry_Stella "
        "strawberry:strawberry|Strawberry2 kiwi=kiwi_fruit:kiwi coconut",
    ),
    "vegetable": (
        "food/vegetables",
        "avocado:../fruit/avocado eggplant:eggplant potato:potato carrot:carrot corn=ear_of_corn:corn "
        "pepper=bell_pepper:pepper|yellowpepper broccoli:broccoli garlic:garlic|garlics onion:onion tomato:tomato",
    ),
    "food": (
        "food",
        "bread croissant pretzel pizza cheese=cheese_wedge burger=hamburger fries=french_fries egg sushi doughnut "
        "cupcake popcorn pancakes",
    ),
    "vehicle": (
        "vehicles",
        "bus:masstransit/green_korean_bus taxi truck=delivery_truck:garbagetruck|auto/truck tractor ambulance "
        "airplane:flight/planes/747 helicopter rocket sailboat:ship/chineseJunk bicycle scooter=motor_scooter "
        "skateboard car=automobile:auto/sedan|auto/beetle|auto/sportscar2 firetruck=fire_engine:emergency/firetruck",
    ),
    "clothing": (
        "clothes",
        "glasses necktie jeans scarf gloves socks dress boot=hiking_boot crown "
        "hat=top_hat:hats/tophat backpack shorts shirt=t-shirt",
    ),
    "tool": (
        "household",
        "hammer:tools/hammer wrench:tools/wrench|tools/wrench_adjustable saw=carpentry_saw:tools/saw "
        "scissors:arttools/scissors_small_open key:key ladder magnet toolbox:tools/toolbox pencil "
        "paintbrush:tools/paintbrush_large",
    ),
    "music": (
        "hobbies/music",
        "saxophone trumpet:brass/trumpet guitar:string/guitar_classical|string/guitar_electric|string/guitar2 "
        "violin:string/violin drum:percussion/drum_tomtom_floor accordion maracas keyboard=musical_keyboard",
    ),
    "sport": (
        "sports",
        "soccer=soccer_ball:soccer basketball:basketball baseball football=american_football:football "
        "tennis:tennis_ball|tennis_racket trophy:trophy_cup kite ",
    ),
    "thing": (
        "household",
        "candle:../seasonal/candle bed chair toilet:toilet umbrella teapot:dishes/teapot "
        "bulb=light_bulb:Lightbulb bell camera:../hobbies/camera_35mm telephone television",
    ),
    "sky": (
        "space",
        "sun:planets/0_sun moon=crescent_moon:moon/moon_crescent star cloud rainbow snowflake "
        "lightning=high_voltage:../naturalforces/lightningbolt fire:../naturalforces/fire ",
    ),
}

COLOURS = {
    "red": (214, 74, 70),
    "orange": (238, 158, 76),
    "yellow": (240, 224, 112),
    "green": (112, 186, 108),
    "blue": (92, 132, 214),
    "purple": (160, 108, 196),
    "grey": (150, 150, 150),
    "white": (246, 246, 246),
}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
NEIGHBOUR = {"left of": {1: 0, 3: 2}, "right of": {0: 1, 2: 3}, "above": {2: 0, 3: 1}, "below": {0: 2, 1: 3}}
"""For each relation: cell of the named object -> cell the question asks about (cells in raster order)."""
NUMBERS = ("zero", "one", "two", "three", "four")
TASKS = ("at", "kind", "count", "colour", "describe", "where", "rel", "behind", "kindby")


@dataclass(frozen=True)
class Concept:
    """One object: its `word`, its `kind`, the emojibase `label` that finds its drawings, its photo `stamps`."""

    word: str
    kind: str
    label: str
    stamps: tuple[str, ...]


def _concept(kind: str, folder: str, entry: str) -> Concept:
    name, _, stamps = entry.partition(":")
    word, _, label = name.partition("=")
    paths = tuple(f"{folder}/{stamp}" for stamp in stamps.split("|") if stamp)
    return Concept(word, kind, (label or word).replace("_", " "), paths)


CONCEPTS = tuple(
    _concept(kind, folder, entry) for kind, (folder, entries) in _TABLE.items() for entry in entries.split()
)
