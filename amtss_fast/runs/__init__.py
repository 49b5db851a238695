"""X"""

from amtss_fast._compat.extras import need_training_extra

need_training_extra(__name__)
