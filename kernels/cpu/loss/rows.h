// The intermediate results of a group of W rows, one lane per row.
#pragma once

#include "simd.h"

namespace {

// The results of one tensor.
struct alignas(64) Measured {
    float z[W];       // sum of e^a
    // Of a teacher: D / tau, from which the forward KL follows. The other divergences are written to it.
    float d[W];
    // e^a of the label (of rows without a label: the largest, 1), and the largest e^a of the other classes. For
    // Weighting::label_nll, `label` is a / tau of the label and `other` is unused.
    float label[W], other[W];
    float alpha[W];   // of a teacher: its prior, 0 if it does not teach the row
    float margin[W], weight[W];
    float scale[W], distance[W];   // of a teacher, for the stats: the deviation of its logits, sum |q - p|
    float inverse_z[W], shift[W];  // of a teacher: 1 / z, and log(z of the student / z)
    float factor[W];  // of e^a in the gradient; 0: the tensor has no part in it. Of a compared teacher: of its slopes
};

// The values of the row itself, and the sums of the cross entropy, which is at temperature 1.
struct alignas(64) Rows {
    int32_t label[W];             // -1: none
    int32_t margin_label[W];      // the label of the margin; -1: the class of the largest logit
    float counts[W];              // 0: the row is dropped
    float weight[W];              // of the row in the loss; 0 if dropped
    float student[W];             // 0: the student's logits are not read
    float cross[W];               // 0: the row has no cross entropy
    float z[W], at_label[W], sum[W];  // of the student's logits less their maximum
    float factor[W];              // of e^(s - maximum) in the gradient
    float slope[W];               // the sum of the slopes over the classes
    float everywhere[W], one_hot[W];  // subtracted from the gradient at each class, at the label
};

}  // namespace
