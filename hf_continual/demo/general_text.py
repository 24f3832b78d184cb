"""Short paragraphs of general knowledge, written for this project, to measure what happens to general language."""

HELD_OUT = (
    "Bread rises because yeast eats the sugar in the dough and gives off gas. The gas is caught in a net of gluten, "
    "which stretches like thousands of tiny balloons. In the oven the gas swells once more, then the crust sets.",
    "A lighthouse is known by its rhythm. Each tower flashes in a pattern of its own, and a sailor who counts the "
    "seconds between two flashes can look up in a list which coast lies ahead, even on a moonless night.",
    "Rivers carry more than water. Stones are rounded on the way down from the hills, sand travels for years, and the "
    "finest mud is dropped only where the river meets the sea and its current comes to rest.",
    "The moon keeps the same face towards the earth because it turns once on its axis in the time of one orbit. This "
    "is no accident: the pull of the earth slowed its spin over a very long time.",
    "When a library lends a book, it lends time. The reader promises to bring it back, and the shelf keeps a gap open. "
    "Most people keep the promise, which is why a town can share a hundred thousand books.",
    "Glass is made from sand, soda and lime. Heated together they melt into a syrup that can be blown, poured or rolled. "
    "If it cools too quickly it cracks, so a new bottle spends hours in a slowly cooling oven.",
    "Bees tell each other where flowers are by dancing. The direction of the dance stands for the direction of the "
    "flight, and the length of each run for the distance. The other bees read it in the dark by touch.",
    "A good bridge is never quite still. It grows longer in summer and shorter in winter, it sways a little in the wind, "
    "and its builders leave narrow gaps in the road so that all this can happen without harm.",
    "In cold countries people once cut blocks of ice from the lakes in winter and stored them under sawdust. The ice "
    "lasted until August, and ships carried it to cities that had never seen snow.",
    "The piano has more than two hundred strings, and together they pull with the weight of several cars. An iron frame "
    "holds them. Without it the wooden case would fold up like a paper box.",
    "Maps always lie a little, because the earth is round and paper is flat. A map can keep the angles true or the areas, "
    "but not both, and every maker of maps must choose what to give up.",
    "Plants drink from the top. Water evaporates from the leaves, and as it leaves it draws the next drops up through "
    "fine tubes from the roots. A tall tree lifts hundreds of litres on a summer day without any pump.",
    "Salt was once so valuable that roads were named after it. Towns grew rich beside the springs and mines from which "
    "it came, because without salt no meat or fish could be kept through the winter.",
    "A clock needs something that swings evenly. First it was a pendulum, later a small crystal of quartz, and today "
    "the best clocks count the swings of atoms, which never grow tired and never warm up.",
    "Clouds look light, yet a single one can weigh as much as a herd of elephants. It stays up because its water is "
    "spread over millions of droplets, each so small that the slightest draught carries it.",
    "Cats purr when they are content, but also when they are hurt. Some people who study animals believe that the slow "
    "trembling helps bones and muscles to heal, much as gentle exercise does.",
    "The first bicycles had no pedals. The rider sat on a wooden beam between two wheels and pushed the ground away with "
    "both feet, which was faster than walking and amused everyone who watched.",
    "Chess is older than most countries. It travelled with merchants from India to Persia and on to Europe, and in every "
    "land the pieces were given new names, clothes and habits.",
    "Rust is iron on its way back to the rock from which it was made. Water and air together take the metal apart, and "
    "only paint, oil or a thin skin of zinc keeps them from doing so.",
    "Islands far from land have strange inhabitants. Birds lose their wings where nothing hunts them, small animals grow "
    "large and large ones small, and plants that were herbs become trees.",
    "Letters used to be folded into their own envelopes and closed with wax. A seal pressed into the wax told the reader "
    "who had written, and whether somebody had opened the letter on the way.",
    "Snow is quiet because it is full of air. Sound that would bounce off stone or water gets lost between the flakes, so "
    "a street after a night of snow seems to hold its breath.",
    "Most of an iceberg lies below the water, because ice is only a little lighter than the sea. Sailors who see the small "
    "white hill at the surface know that a mountain hangs underneath.",
    "Coffee plants grow in the shade of taller trees. The red cherries ripen slowly, one by one, so they are picked by "
    "hand, and only the two seeds inside each cherry are dried and roasted.",
)
