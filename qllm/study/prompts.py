"""The texts of the built-in profiles, written for this project: openings to be continued and
passages to be read.

All are plain English of the kind that models trained on stories for children know. An opening
stops in the middle of a thought, without a space at its end, so that the next word is the
model's own.
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

PROMPT_SETS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "openings": OPENINGS,
    "prompts-48": OPENINGS,
    "prompts-96": OPENINGS,
}
"""Sets of prompts that a design may name."""

TEXT_SETS: dict[str, tuple[tuple[str, str, str], ...]] = {"passages": PASSAGES}
"""Sets of passages that a design may name."""
