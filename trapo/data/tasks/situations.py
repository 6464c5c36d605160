"""The situations of the word problems stand here as data: what happens, in words and in arithmetic.

A row is (key, steps, text). Text slots: {n} and {m} two people, {o} things (plural), {a} to {d} numbers.
A step is "left op right" over numbers, literals and `_`, the result of the step before.

STORIES are whole problems. OPENINGS give somebody a stock of things in one step, EVENTS change it in a second
one, and each opening goes with each event. No row of the test split has a counterpart in the train split: its
situations (floors, temperatures, tanks, rectangles, bills, ...) appear nowhere else.
"""

from __future__ import annotations

Row = tuple[str, str, str]

NAMES = """
    Ada Ali Amy Ana Ben Bo Carl Cora Dan Dina Ed Ella Emma Eva Finn Fred Gina Greg Hana Hugo Ian Ida
    Ines Ivan Jack Jane Joe Juan Kai Kate Kim Lars Lea Leo Lily Liz Luis Mary Max Maya Mei Mia Mike
    Nick Nina Noah Nora Olga Omar Paul Pia Ravi Rita Rob Rosa Ruth Sam Sara Seth Sofia Sue Tara Ted
    Tim Tom Una Vera Will Yara Zoe
""".split()  # noqa: SIM905

THINGS = """
    apples balls balloons beads books bottles bricks buttons candles candies caps cards coins
    cookies cups dolls eggs erasers flowers forks grapes hats jars keys kites lemons magnets marbles
    masks mugs nails nuts oranges peaches pears pencils pens photos pins plums puzzles ribbons rings
    rocks ropes scarves seeds shells shirts socks spoons stamps stickers stones tickets tiles
    tomatoes toys whistles
""".split()  # noqa: SIM905

OPENINGS: dict[str, tuple[Row, ...]] = {
    "train": (
        ("two_colours", "a + b", "{n} has {a} red {o} and {b} blue {o}."),
        ("bags", "a * b", "{n} buys {a} bags with {b} {o} in each bag."),
        ("lost", "a - b", "{n} had {a} {o} and lost {b} of them."),
        ("two_times_of_day", "a + b", "{n} gets {a} {o} in the morning and {b} {o} in the evening."),
        ("gift", "a + b", "{n} has {a} {o}. {m} gives {n} {b} more {o}."),
        ("daily", "a * b", "{n} makes {a} {o} every day for {b} days."),
        ("gave", "a - b", "{n} had {a} {o} and gave {b} of them to {m}."),
        ("piles", "a / b", "{n} sorts {a} {o} into {b} equal piles and keeps only one pile."),
        ("boxes", "a * b", "{n} has {a} boxes. Each box holds {b} {o}."),
        ("sold", "a - b", "{n} brings {a} {o} to the market and sells {b} of them."),
    ),
    "test": (
        ("shelf_rows", "a * b", "A shelf has {a} rows with {b} {o} in every row."),
        ("two_baskets", "a + b", "There are {a} {o} in a basket and {b} {o} on the table next to it."),
        ("broken", "a - b", "A store received {a} {o}, but {b} of them were broken and thrown out."),
        ("delivery", "a + b", "A store with {a} {o} gets a delivery of {b} {o}."),
        ("trucks", "a * b", "There are {a} trucks, and every truck carries {b} {o}."),
    ),
}

# After an opening alone: a one-step problem. The test openings have no owner.
TOTALS = {
    "train": ("How many {o} does {n} have now?", "How many {o} does {n} have?"),
    "test": ("How many {o} are there now?", "How many {o} are there in the end?"),
}

EVENTS: dict[str, tuple[Row, ...]] = {
    "train": (
        ("finds", "_ + c", "Then {n} finds {c} more. How many {o} does {n} have now?"),
        ("gives_away", "_ - c", "Then {n} gives away {c} of them. How many {o} does {n} have left?"),
        ("friends", "_ / c", "{n} shares them equally among {c} friends. How many {o} does each friend get?"),
        ("times_as_many", "_ * c", "{m} has {c} times as many {o} as {n}. How many {o} does {m} have?"),
        ("at_home", "_ + c", "{n} has {c} other {o} at home. How many {o} does {n} have in total?"),
        ("thief", "_ - c", "Then {m} takes {c} of them. How many {o} are left for {n}?"),
        ("goal", "c - _", "{n} wants to have {c} {o}. How many more {o} does {n} need?"),
        ("packs", "_ / c", "{n} packs them in boxes of {c}. How many boxes does {n} need?"),
        ("fewer", "_ - c", "{m} has {c} fewer {o} than {n}. How many {o} does {m} have?"),
        ("more_than", "_ + c", "{m} has {c} more {o} than {n}. How many {o} does {m} have?"),
    ),
    "test": (
        ("rolls_away", "_ - c", "During the night, {c} {o} disappear. How many {o} remain?"),
        ("topped_up", "_ + c", "A worker brings {c} additional {o}. How many {o} are there in all?"),
        (
            "children",
            "_ / c",
            "A class of {c} children divides all of them fairly. How many {o} go to one child?",
        ),
        ("by_friday", "_ * c", "By Friday the number of {o} is {c} times as large. How many {o} are there on Friday?"),
        ("room_for", "c - _", "There is room for {c} {o}. How many more {o} would fit?"),
    ),
}

STORIES: dict[str, tuple[Row, ...]] = {
    "train": (
        ("older", "a + b", "{n} is {a} years old. {m} is {b} years older than {n}. How old is {m}?"),
        ("younger", "a - b", "{n} is {a} years old. {m} is {b} years younger than {n}. How old is {m}?"),
        ("price", "a * b", "One ticket costs {a} dollars. How many dollars do {b} tickets cost?"),
        ("pages_left", "a - b", "A book has {a} pages. {n} has read {b} pages. How many pages are left?"),
        (
            "walk",
            "a + b",
            "{n} walks {a} miles on Monday and {b} miles on Tuesday. How many miles is that in total?",
        ),
        (
            "points",
            "a - b",
            "{n} scores {a} points and {m} scores {b} points. How many more points does {n} have?",
        ),
        ("half", "a / 2", "{n} has {a} {o} and gives half of them to {m}. How many {o} does {m} get?"),
        ("teams", "a / b", "{a} players form teams of {b} players. How many teams are there?"),
        ("weekly", "a * b", "{n} saves {a} dollars every week. How many dollars does {n} save in {b} weeks?"),
        (
            "tables",
            "a * b",
            "A room has {a} tables with {b} chairs at each table. How many chairs are there?",
        ),
        (
            "bus",
            "a - b; _ + c",
            "A bus has {a} riders. Then {b} get off and {c} get on. How many riders are there now?",
        ),
        (
            "change",
            "a * b; c - _",
            "{n} buys {a} pens for {b} dollars each and pays with {c} dollars. How many dollars does {n} get back?",
        ),
        (
            "reading_days",
            "a - b; _ / c",
            "A book has {a} pages. {n} has read {b} pages and now reads {c} pages a day. "
            "How many days does {n} need for the rest?",
        ),
        (
            "absent",
            "a + b; _ - c",
            "A class has {a} boys and {b} girls. Today {c} of them are sick. How many children are in class?",
        ),
        (
            "savings",
            "a * b; _ - c",
            "{n} saves {a} dollars a week for {b} weeks and then spends {c} dollars. How many dollars are left?",
        ),
        (
            "twice_together",
            "a * 2; _ + a",
            "{n} has {a} {o}. {m} has twice as many. How many do they have together?",
        ),
        (
            "fewer_together",
            "a - b; _ + a",
            "{n} has {a} {o}. {m} has {b} fewer than {n}. How many do they have together?",
        ),
        (
            "more_together",
            "a + b; _ + a",
            "{n} has {a} {o}. {m} has {b} more than {n}. How many do they have together?",
        ),
        (
            "later_age",
            "a - b; _ + c",
            "{n} is {a} years old and {m} is {b} years younger. How old will {m} be in {c} years?",
        ),
        (
            "half_more",
            "a / 2; _ + c",
            "{n} sells half of {a} {o} and then buys {c} new ones. How many {o} does {n} have now?",
        ),
        (
            "picked",
            "a + b; _ / c",
            "{n} picks {a} {o} and {m} picks {b} {o}. They put them in {c} equal bags. How many {o} are in each bag?",
        ),
        (
            "groups_and_rest",
            "a * b; _ + c",
            "{a} groups of {b} pupils and {c} teachers go on a trip. How many people go on the trip?",
        ),
    ),
    "test": (
        ("floors", "a + b", "A lift is on floor {a} and goes up {b} floors. On which floor does it stop?"),
        (
            "colder",
            "a - b",
            "It was {a} degrees at noon. By night it got {b} degrees colder. How many degrees is it?",
        ),
        ("tiles", "a * b", "A floor is {a} tiles long and {b} tiles wide. How many tiles cover it?"),
        (
            "rope",
            "a / b",
            "A rope of {a} meters is cut into {b} equal parts. How many meters long is one part?",
        ),
        ("wage", "a * b", "{n} earns {a} dollars an hour. How many dollars does {n} earn in {b} hours?"),
        (
            "tank",
            "a - b",
            "A tank holds {a} liters and {b} liters leak out. How many liters stay in the tank?",
        ),
        ("cake_eggs", "a / b", "A cake needs {b} eggs. How many cakes can {n} bake with {a} eggs?"),
        (
            "two_roads",
            "a + b",
            "The road from the farm to the lake is {a} miles, and from the lake to the town {b} miles. "
            "How far is it from the farm to the town?",
        ),
        (
            "lift_down",
            "a + b; _ - c",
            "A lift on floor {a} goes up {b} floors and then down {c} floors. On which floor is it now?",
        ),
        (
            "warm_again",
            "a - b; _ + c",
            "It was {a} degrees. The temperature fell by {b} degrees and then rose by {c}. How many degrees is it?",
        ),
        (
            "around",
            "a + b; _ * 2",
            "A garden is {a} meters long and {b} meters wide. How many meters of fence go all around it?",
        ),
        (
            "loose_tiles",
            "a * b; _ - c",
            "A wall is {a} tiles wide and {b} tiles high, but {c} tiles fell off. How many tiles are on the wall?",
        ),
        (
            "wage_fare",
            "a * b; _ - c",
            "{n} works {a} hours for {b} dollars an hour and pays {c} dollars for the train. "
            "How many dollars does {n} keep?",
        ),
        (
            "bill",
            "a + b; _ / c",
            "A dinner costs {a} dollars and the drinks {b} dollars. {c} guests split the bill. "
            "How many dollars does each guest pay?",
        ),
        (
            "seats",
            "a * b; _ - c",
            "A train has {a} cars with {b} seats each. {c} seats are taken. How many seats are free?",
        ),
        (
            "refill",
            "a - b; _ + c",
            "A tank with {a} liters loses {b} liters and is refilled with {c} liters. How many liters are in the tank?",
        ),
    ),
}
