"""A collection: a folder of slides made searchable, and kept so as slides come and go.

``python -m histo_utils.collection SLIDES OUT`` goes from a folder of slides to mosaics,
vectors, an archive and an atlas. What is finished for a slide is not done again while
its file (path, size, time of change), the parameters and the encoder's weights stay the
same: a run that was stopped goes on, and a new slide costs one slide.

In ``OUT``::

    collection.json   whose slides these are, and what they were made with
    report.csv        one line a slide: done, no tissue or failed, and why
    mosaics/          the tissue patches of each slide
    vectors/          one folder a slide: the vectors of its mosaic, with its patches
    archive/          all of them, with patients and labels: Embeddings.load's folder
    atlas.html        the pictures

Files:

building
    `index_slides`: all of it, in order
listing
    which slides there are, with what the CSV says of them
upkeep
    whose folder it is; what no longer belongs there goes
vectors
    of one slide, and of all of them
drawing
    which patches the atlas shows
finding
    `find`: search with an image of one's own
"""

from histo_utils.collection.building import Indexed, index_slides
from histo_utils.collection.finding import find

__all__ = ["Indexed", "find", "index_slides"]
