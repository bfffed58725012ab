/* The LSTM's cell, one step, and its derivative: what lstm.py has as cell_forward and cell_backward. A dozen
   operations on small vectors become one pass over memory. */
#include "numbers.h"

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }
static inline float tanh_(float x) { return 1 - 2 / (1 + exponential(2 * x)); }

/* One step of B rows. gates [B, 4H] holds W x_t + b and receives the gates; from_h [B, 4H] is U h_{t-1}; the
   others are [B, H]. The cell is float32 whatever scalar_t is, because c is a long sum. */
void cell_forward(long B, long H, scalar_t *gates, const scalar_t *from_h, const float *c_before, float *c,
                  scalar_t *h) {
    #pragma omp parallel for if (B * H > 2048)
    for (long b = 0; b < B; b++) {
        scalar_t *G = gates + 4 * b * H;
        const scalar_t *U = from_h + 4 * b * H;
        #pragma omp simd
        for (long j = 0; j < H; j++) {
            long k = b * H + j;
            float i = sigmoid(load(G[j]) + load(U[j])), f = sigmoid(load(G[H + j]) + load(U[H + j]));
            float g = tanh_(load(G[2 * H + j]) + load(U[2 * H + j]));
            float o = sigmoid(load(G[3 * H + j]) + load(U[3 * H + j]));
            G[j] = store(i), G[H + j] = store(f), G[2 * H + j] = store(g), G[3 * H + j] = store(o);
            c[k] = f * c_before[k] + i * g;
            h[k] = store(o * tanh_(c[k]));
        }
    }
}

/* dh_t = grad_h + from_next. dc holds dc_{t+1} f_{t+1} before and dc_t f_t after; da [B, 4H] is written. */
void cell_backward(long B, long H, const scalar_t *gates, const scalar_t *grad_h, const scalar_t *from_next,
                   const float *c_before, const float *c, scalar_t *da, float *dc) {
    #pragma omp parallel for if (B * H > 2048)
    for (long b = 0; b < B; b++) {
        const scalar_t *G = gates + 4 * b * H;
        scalar_t *D = da + 4 * b * H;
        #pragma omp simd
        for (long j = 0; j < H; j++) {
            long k = b * H + j;
            float i = load(G[j]), f = load(G[H + j]), g = load(G[2 * H + j]), o = load(G[3 * H + j]);
            float t = tanh_(c[k]), dh = load(grad_h[k]) + load(from_next[k]);
            float d = dc[k] + dh * o * (1 - t * t);
            D[j] = store(d * g * i * (1 - i)), D[H + j] = store(d * c_before[k] * f * (1 - f));
            D[2 * H + j] = store(d * i * (1 - g * g)), D[3 * H + j] = store(dh * t * o * (1 - o));
            dc[k] = d * f;
        }
    }
}
