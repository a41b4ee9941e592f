"""Draw figure 4: the curves of GoogLeNet on ImageNet, by initialization (section 4.5).

    python experiments/figure4.py build/figure4.png build/reference build/kmeans build/single \\
        --names reference 'ours, k-means' 'ours, k-means, single classifier'

Only the loss of the last classifier is shown, so that nets with and without auxiliary classifiers
can be compared. The rows show the first 10,000 iterations, the first 100,000, and all.
"""
import sys

from imagenet import curves

if __name__ == "__main__":
    sys.exit(curves.command("figure4", __doc__.splitlines()[0]))
