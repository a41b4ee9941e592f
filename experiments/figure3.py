"""Draw figure 3: the curves of CaffeNet on ImageNet, by initialization (section 4.5).

    python experiments/figure3.py build/figure3.png build/reference build/gaussian build/kmeans \\
        build/kmeans_nolrn --names reference 'ours, Gaussian' 'ours, k-means' 'k-means, no LRN'

The rows show the first 10,000 iterations, the first 100,000, and all.
"""
import sys

from imagenet import curves

if __name__ == "__main__":
    sys.exit(curves.command("figure3", __doc__.splitlines()[0]))
