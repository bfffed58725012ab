/* What stands between the matrix products of a decoder layer, and its derivatives: layer.py,
   LayerFunction. Each is one pass over the rows. */
#include "numbers.h"

#ifdef WIDE                                     /* what the layers pass on is float32, whatever scalar_t is */
typedef float x_t;
#define load_x(v) (v)
#define store_x(v) (v)
#else
typedef scalar_t x_t;
#define load_x load
#define store_x store
#endif

/* N rows of D: n = w * x * r, where r = 1 / sqrt(mean(x^2) + eps) */
void norm(long N, long D, float eps, const x_t *x, const x_t *w, scalar_t *n, float *r) {
    #pragma omp parallel for if (N * D > 8192)
    for (long i = 0; i < N; i++) {
        const x_t *x_i = x + i * D;
        float squares = 0;
        #pragma omp simd reduction(+:squares)
        for (long j = 0; j < D; j++) squares += load_x(x_i[j]) * load_x(x_i[j]);
        float r_i = r[i] = 1 / sqrtf(squares / D + eps);
        #pragma omp simd
        for (long j = 0; j < D; j++) n[i * D + j] = store(load_x(x_i[j]) * r_i * load_x(w[j]));
    }
}

/* dx = dy + r (w dn - x r mean(w dn x r)). dw [64, D]: the sums of dn x r over each 64th of the rows, so that
   the result does not depend on which thread is first (OpenMP's reduction has no fixed order). */
void norm_backward(long N, long D, const x_t *x, const x_t *w, const float *r, const scalar_t *dn,
                   const x_t *dy, x_t *dx, float *dw) {
    #pragma omp parallel for if (N * D > 8192)
    for (long b = 0; b < 64; b++) for (long i = b * N / 64; i < (b + 1) * N / 64; i++) {
        const x_t *x_i = x + i * D;
        const scalar_t *dn_i = dn + i * D;
        float mean = 0;
        #pragma omp simd reduction(+:mean)
        for (long j = 0; j < D; j++) {
            float part = load(dn_i[j]) * load_x(x_i[j]) * r[i];
            dw[b * D + j] += part, mean += part * load_x(w[j]);
        }
        mean /= D;
        #pragma omp simd
        for (long j = 0; j < D; j++) {
            float d = load_x(w[j]) * load(dn_i[j]) - load_x(x_i[j]) * r[i] * mean;
            dx[i * D + j] = store_x(load_x(dy[i * D + j]) + r[i] * d);
        }
    }
}

/* sign 1: row (b, t) of qkv holds all heads of q, of k and of v; they go to q, k, v [B, heads, T, d], q and k
   turned by the angle of t. sign -1: the way back, turned back. */
void rotate(long B, long T, long n_q, long n_kv, long d, long sign, const float *cos, const float *sin,
            scalar_t *qkv, scalar_t *q, scalar_t *k, scalar_t *v) {
    #pragma omp parallel for if (B * T * n_q * d > 8192)
    for (long i = 0; i < B * T; i++) for (long h = 0; h < n_q + 2 * n_kv; h++) {
        long b = i / T, t = i % T, from_k = h - n_q, from_v = from_k - n_kv;
        scalar_t *a = qkv + (i * (n_q + 2 * n_kv) + h) * d;
        scalar_t *z = from_v >= 0 ? v + ((b * n_kv + from_v) * T + t) * d
                    : from_k >= 0 ? k + ((b * n_kv + from_k) * T + t) * d : q + ((b * n_q + h) * T + t) * d;
        if (sign < 0) { scalar_t *other = a; a = z, z = other; }
        if (from_v >= 0) memcpy(z, a, d * sizeof *a);
        else
            #pragma omp simd
            for (long j = 0; j < d / 2; j++) {
                float x = load(a[j]), y = load(a[j + d / 2]), c = cos[t * d + j], s = sign * sin[t * d + j];
                z[j] = store(x * c - y * s), z[j + d / 2] = store(y * c + x * s);
            }
    }
}

/* gate and up, side by side in a row of 2F -> m = gate s up, where s = sigma(gate). And back:
   d_gate = dm up s (1 + gate (1 - s)), d_up = dm gate s */
void swiglu(long N, long F, const scalar_t *gate_up, scalar_t *m) {
    #pragma omp parallel for if (N * F > 8192)
    for (long i = 0; i < N; i++) {
        const scalar_t *gate = gate_up + 2 * i * F, *up = gate + F;
        #pragma omp simd
        for (long j = 0; j < F; j++) {
            float g = load(gate[j]);
            m[i * F + j] = store(g / (1 + exponential(-g)) * load(up[j]));
        }
    }
}
void swiglu_backward(long N, long F, const scalar_t *gate_up, const scalar_t *dm, scalar_t *d) {
    #pragma omp parallel for if (N * F > 8192)
    for (long i = 0; i < N; i++) {
        const scalar_t *gate = gate_up + 2 * i * F, *up = gate + F;
        scalar_t *d_gate = d + 2 * i * F, *d_up = d_gate + F;
        #pragma omp simd
        for (long j = 0; j < F; j++) {
            float g = load(gate[j]), s = 1 / (1 + exponential(-g)), dm_j = load(dm[i * F + j]);
            d_gate[j] = store(dm_j * load(up[j]) * s * (1 + g * (1 - s))), d_up[j] = store(dm_j * g * s);
        }
    }
}
