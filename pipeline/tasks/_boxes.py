"""Boxes: the objects of an image, as detection's targets.   B batch, N objects of an image at most.

A box is (left, top, right, bottom) in pixels of the batch's images, which are larger than the image that they hold.
"""

from __future__ import annotations

BOXES = "boxes_BN4"
"""Name of the targets: float32 [B, N, 4], the boxes; zeros where an image has fewer than N."""
CLASSES = "classes_BN"
"""int64 [B, N], the class of each box, counted from 0; −1 where there is no box."""
CROWD = "crowd_BN"
"""bool [B, N], whether a box is of a crowd: of many objects, or of a difficult one. It is no target and no error."""
AREAS = "areas_BN"
"""float32 [B, N], the area of each object in pixels of the stored image. It says whether the object is small."""
SIZES = "sizes_B2"
"""int64 [B, 2], height and width of the part of a batch's image that is not padding."""
SCALES = "scales_B2"
"""float32 [B, 2], pixels of the batch's image for a pixel of the stored image, along height and width."""
DRAWS = "draws_B2"
"""int64 [B, 2], random numbers of each image and view, by which a detector chooses what it learns from."""
DETECTIONS = "detections"
"""Tap of what a network finds: float32 [B, 100, 6], box, score, class; the best first, zeros and class −1 behind."""
LIKELY = 0.3
"""Score from which on a detection is shown and counts as a decision, as in the pictures of mmdetection."""
