"""The texts of the built-in profiles, written for this project: openings to be continued and
passages to be read.

The openings and passages of the small profiles are plain English of the kind that models trained on
stories for children know. An opening stops in the middle of a thought, without a space at its end,
so that the next word is the model's own.
"""

from __future__ import annotations

OPENINGS: tuple[tuple[str, str, str], ...] = (
    (
        "fox",
        "animal",
        "Once upon a time, a little fox lived under an old oak tree. One morning, she",
    ),
    (
        "kite",
        "problem",
        "Tom had a red kite. The wind was strong, and the kite got stuck in a tall tree. Tom",
    ),
    (
        "soup",
        "dialogue",
        '"Can I help you make the soup?" asked Lily. Her grandma smiled and said, "',
    ),
    (
        "storm",
        "weather",
        "It was dark outside and the rain was loud. Ben heard a strange noise. He",
    ),
    (
        "share",
        "lesson",
        "Mia and Sam both wanted the same blue ball. They pulled and pulled. Then their mom",
    ),
    (
        "garden",
        "description",
        "Behind the house there was a small garden. In the garden there were",
    ),
    (
        "lost",
        "friendship",
        "A small brown dog was lost in the park. A girl named Anna saw the dog and",
    ),
    (
        "wish",
        "magic",
        "The old man gave the boy a shiny stone and told him to make a wish. The boy",
    ),
)
"""(id, kind, text) of the openings that the models continue."""

PASSAGES: tuple[tuple[str, str, str], ...] = (
    (
        "boat",
        "story",
        "Nina and her dad made a boat out of paper. They took it to the pond and put it on the"
        " water."
        " The boat was slow at first. Then a duck swam by and made a wave, and the boat went fast."
        ' Nina clapped her hands and ran along the side. "Look, Dad, it is going home!" she said.',
    ),
    (
        "bread",
        "daily life",
        "Every morning the baker woke up before the sun. He mixed flour and water and let the dough"
        " sleep in a warm bowl. When it was big and soft, he made round loaves and put them in the"
        " hot oven. Soon the whole street smelled of bread, and the children came to his door.",
    ),
    (
        "owl",
        "animal",
        "The owl could not sleep in the day because the birds were too loud. She asked them to be"
        " quiet, but they only sang more. So the owl sang with them. Her song was so funny that all"
        " the birds laughed, and then they were tired and went to sleep too.",
    ),
    (
        "tooth",
        "dialogue",
        '"My tooth is loose," said Max. "Do not be afraid," said his sister. "When it falls out, a'
        ' new one will grow." Max pushed the tooth with his tongue. It did not hurt at all. At'
        " lunch"
        " he took a bite of an apple, and there it was, small and white, in the red skin.",
    ),
    (
        "snow",
        "weather",
        "In the night the snow fell without a sound. When Clara opened the door, the garden was"
        " white"
        " and the path was gone. She put on her boots and her green hat. She made one step, and"
        " then"
        " another, and behind her she left a long line of little holes.",
    ),
    (
        "bridge",
        "problem",
        "The goat wanted to cross the river, but the bridge was broken. He looked for a stone and"
        " found a log instead. He pushed it with his head until it lay over the water. The log was"
        " thin and the goat was afraid, but he looked at the other side and not at his feet.",
    ),
    (
        "clock",
        "object",
        "There was a clock in the kitchen that was always late. Mother said it was old and needed"
        " to"
        " rest. One day it stopped, and the room was too quiet. Father opened the back and found a"
        " tiny feather inside. He took it out, and the clock began to tick again.",
    ),
    (
        "market",
        "lesson",
        "At the market a boy saw a purse on the ground. There was money in it, and nobody was near."
        " He thought about the toy he wanted. Then he saw an old woman who looked sad and searched"
        " her bag. He ran to her and gave her the purse, and she gave him a warm smile.",
    ),
)
"""(id, kind, text) of the passages on which reference and arm are compared word by word."""

_KINDS: dict[str, tuple[str, ...]] = {
    "factual": (
        "The moon goes around the earth once in about a month. Because of this, we",
        "Water turns into ice when it gets very cold. When the ice is put near a fire, it",
        "A year has four seasons. The first one is spring, and after that",
        "Bees fly from flower to flower to collect nectar. Back in the hive they",
        "The heart of an animal pumps blood through its body. When the animal runs,",
        "Rivers begin as small streams in the mountains and end in the sea. On their way they",
        "Iron is a metal that is used to build bridges and ships. Its main weakness is that",
        "The largest animal that has ever lived is the blue whale. It eats",
        "Sound travels through the air as a wave. In empty space there is no air, so",
        "Bread is made of flour, water, salt and yeast. The yeast is needed because",
        "A compass needle points to the north. Sailors have used it to",
        "Trees take in carbon dioxide from the air and give off oxygen. At night, however,",
    ),
    "biography": (
        "Helen Marsh was born in a small fishing village. As a child she liked to draw boats, "
        "and later she",
        "When Peter Lindqvist was ten years old, his father gave him a broken radio. He",
        "Dr. Amara Osei studied medicine far from home. After her exams she",
        "As a young man, the painter Tomas Reyes worked in a bakery at night. In the daytime he",
        "Ruth Feldman taught mathematics for forty years. Her pupils remember that she",
        "The explorer Ingrid Dahl was the first of her family to leave the valley. On her "
        "first journey",
        "Before he became a judge, Samuel Wright had been a carpenter. People said that he",
        "Maria Costa wrote her first song when she was seven. By the age of twenty she",
        "Old Captain Brandt had crossed the ocean more than a hundred times. In his last years he",
        "The inventor Li Wen kept a notebook beside her bed. In it she wrote",
        "George Miller was never the fastest runner at school, but he trained every day, and",
        "Fatima Haddad opened her little bookshop in the year of the great flood. At first",
    ),
    "news": (
        "The town council decided on Monday that the old bridge will be closed. The mayor said",
        "After three days of heavy snow, the trains are running again. Travellers",
        "A young elephant was born at the city zoo this week. Visitors will be able to",
        "The harvest was better than expected this year, farmers reported. The price of apples",
        "Firefighters saved a family and their dog from a burning house last night. A neighbour",
        "The local team won the final by one goal. After the match the coach said",
        "A new library will open in the station building in May. It will have",
        "Scientists have found a river under the ice of the south. They now want to",
        "The bakery on Market Street is closing after ninety years. Its owner explained",
        "Because of the storm, all schools in the north will stay closed on Friday. Parents",
        "The museum has bought back a painting that was stolen long ago. The director",
        "Researchers counted fewer butterflies this summer than ever before. They believe that",
    ),
    "story": (
        "Every evening the lighthouse keeper climbed the stairs with his lamp. But tonight",
        "The princess did not want to marry anyone. She wanted to learn how to",
        "There was a box under the bed, and nobody knew who had put it there. When Jack opened it,",
        "The robot had worked in the garden for years. One spring morning it found a bird that",
        "Two brothers lived at opposite ends of a long road. They had not spoken since",
        "The ship had been lost for forty days when the cook saw something strange on the "
        "horizon. It",
        "Nobody in the village believed in giants until the winter when",
        "She read the letter twice. Then she put on her coat, opened the door and",
        "The cat walked along the wall, looked at the moon and thought about",
        "On the last day of summer, the children built a raft out of old doors. They",
        "The clockmaker had only one rule: never touch the clock in the corner. His apprentice",
        "Deep in the forest there was a house with no windows. An old woman lived there, and she",
    ),
    "how-to": (
        "To make a cup of tea, first boil some water. Then",
        "How to plant a tree: dig a hole that is twice as wide as the roots. Next,",
        "If your bicycle has a flat tyre, turn it upside down and take off the wheel. After that",
        "To wash a woollen sweater, fill a bowl with cold water and",
        "To fold a paper boat, begin with a sheet that is longer than it is wide. Fold it",
        "How to write a letter: put the date in the corner and begin with a greeting. Then",
        "Before you paint a wall, you should clean it and",
        "To teach a dog to sit, hold a treat above its nose. When it",
        "To cook rice, wash it until the water is clear, then put it in a pot and",
        "If you get lost in the woods, stay calm. First of all,",
        "To build a simple shelf you need two boards, four screws and a drill. Start by",
        "How to fall asleep more easily: go to bed at the same time every day, and",
    ),
    "code": (
        "def add(a, b):\n    return a + b\n\ndef multiply(a, b):\n    return",
        "# Count the words in a text.\ndef count_words(text):\n    words = text.split()\n   ",
        "for i in range(10):\n    if i % 2 == 0:\n        print(i)\n    else:\n       ",
        "#include <stdio.h>\n\nint main(void)\n{\n    printf(\"Hello\\n\");\n   ",
        "def largest(numbers):\n    best = numbers[0]\n    for number in numbers:\n        if "
        "number >",
        "SELECT name, age\nFROM people\nWHERE age >",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, "
        "item):\n       ",
        "function isEven(n) {\n    return n % 2 ===",
        "names = [\"Ann\", \"Bob\", \"Cy\"]\nfor name in names:\n    print(\"Hello, \" +",
        "# Read a file and print every line with its number.\nwith open(path) as file:\n    "
        "for number,",
        "def is_prime(n):\n    if n < 2:\n        return False\n    for d in range(2, n):\n       ",
        "<ul>\n  <li>Milk</li>\n  <li>Eggs</li>\n  <li>",
    ),
    "list": (
        "Things to take to the beach:\n1. a towel\n2. a hat\n3.",
        "Animals that live on a farm: cows, pigs, hens,",
        "The days of the week are Monday, Tuesday,",
        "Shopping list:\n- bread\n- milk\n- apples\n-",
        "Three reasons to read a book:\n1. You learn something new.\n2.",
        "Colours of the rainbow: red, orange,",
        "What I did today:\n* I got up early.\n* I made breakfast.\n*",
        "Tools in the shed: a hammer, a saw,",
        "Rules of the game:\n1. Every player gets five cards.\n2.",
        "Numbers from one to ten: one, two, three,",
        "Good names for a dog: Max, Bella,",
        "Steps to clean your room:\n1. Pick up the toys.\n2. Make the bed.\n3.",
    ),
    "dialogue": (
        '"Where have you been all day?" asked his mother. "I was',
        '"Do you know what time it is?" the guard said. The boy shook his head and answered, "',
        "Anna: Did you hear the news?\nBen: No, what happened?\nAnna:",
        '"I am not afraid of the dark," said the little bear. "Then why',
        "Customer: This clock does not work.\nSeller: Let me have a look. It seems that",
        '"Please do not tell anyone," whispered Emma. Her sister promised, but',
        "Teacher: What is seven times eight?\nPupil: I think it is",
        '"If you give me your apple," said the fox, "I will',
        '"Can we go swimming now?" asked the twins. "Not before',
        "Doctor: How long have you had this cough?\nPatient:",
        '"You cannot cross here," said the old ferryman. "The river is',
        "Q: Why is the sky blue?\nA: Because",
    ),
}
"""By kind of text, openings for models of any size, in the form of texts to be completed."""


def _of_kinds(each: int) -> tuple[tuple[str, str, str], ...]:
    """The first `each` openings of every kind."""
    return tuple(
        (f"{kind}-{number}", kind, text)
        for kind, texts in _KINDS.items()
        for number, text in enumerate(texts[:each], start=1)
    )


PROMPT_SETS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "openings": OPENINGS,
    "prompts-48": _of_kinds(6),
    "prompts-96": _of_kinds(12),
}
"""Sets of prompts that a design may name: (id, kind, text) each."""

TEXT_SETS: dict[str, tuple[tuple[str, str, str], ...]] = {"passages": PASSAGES}
"""Sets of passages that a design may name."""
