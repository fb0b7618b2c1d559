// One step of a plan on a GPU: all that is not the network's evaluation.
//
// It computes what `run_plan` in plan.py does, in the same order and without fused multiply-adds:
// the same answers and draws lead to the same states, bit for bit. `make ptx` makes step.ptx of it,
// which any driver of CUDA 12.2 or later compiles for its GPU. device_loop.py mirrors the structs.

typedef unsigned long long u64;

struct Row {              // of the plan, as plan.Row
    long long t;          // the number that the network is fed
    u64 stream, number;   // of the draw
    float from_x, from_answer, signal, noise, eps_from_x, eps_from_x0, a, s;
    float weight, kept;   // of a measurement: of the correction, of the draw (DDNM+)
    int evaluate, guided;
};

struct Run {              // a plan's, of one batch
    u64 seed, first;      // of the draws; the index of the first sample
    long long batch, values, history, questions;  // samples, values of one, m kept, inputs t
    int form_eps, on_x0;  // whether m is eps; whether x0 is clipped or measured
    float limit;          // of x0; infinite = none
    int *row;             // that runs; -1 before the first
    int *bad;             // the first row with an answer that is not finite; -1 = none; (batch,)
    const Row *table;     // (rows,)
    const float *b;       // (rows, history)
    long long *t;         // the network's input; (questions,)
    float *x;             // the network's input, twice where it is asked twice; (questions, values)
    const float *answer;  // with the labels, then without; (questions, values)
    float *m, *x0;        // (history, batch, values), (batch, values)
    const float *push;    // scale - 1 of guidance; (batch,)
    const float *known, *y;  // of a mask: 1 where y is known; (batch, values); null = no mask
};

// Uniform words by Philox4x64-10 (Salmon et al. 2011) and a pair of normals (Box and Muller 1958):
// noise version 1, see noise.py.
__device__ static float normal(u64 seed, u64 stream, u64 sample, u64 row, u64 value) {
    u64 c0 = value / 4 + 1, c1 = row, c2 = sample, c3 = 0, k0 = seed, k1 = stream;
    for (int round = 0; round < 10; round++) {
        u64 low0 = 0xD2E7470EE14C6C93ULL * c0, high0 = __umul64hi(0xD2E7470EE14C6C93ULL, c0);
        u64 low1 = 0xCA5A826395121157ULL * c2, high1 = __umul64hi(0xCA5A826395121157ULL, c2);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B97F4A7C15ULL;
        k1 += 0xBB67AE8584CAA73BULL;
    }
    bool upper = value / 2 % 2;
    double u = (double)((upper ? c2 : c0) >> 11) * 0x1p-53;
    double v = (double)((upper ? c3 : c1) >> 11) * 0x1p-53;
    double radius = sqrt(-2.0 * log1p(-u)), angle = 2.0 * 3.14159265358979323846 * v;
    return (float)(radius * (value % 2 ? sin(angle) : cos(angle)));
}

// Before the network: go to the next row. One thread.
extern "C" __global__ void begin(const Run *run) {
    const int row = *run->row + 1;
    const long long t = run->table[row].t, questions = run->questions;
    long long *out = run->t;
    *run->row = row;
    for (long long i = 0; i < questions; i++) out[i] = t;
}

// After it: x, m and x0 of the row. One thread a value of a state.
extern "C" __global__ void advance(const Run *pointer) {
    const Run run = *pointer;
    const long long size = run.batch * run.values;
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= size) return;
    const int r = *run.row;
    const Row row = run.table[r];
    const long long sample = i / run.values;
    const float known = run.known ? run.known[i] : 0.0f;
    const float x = run.x[i];
    if (row.evaluate) {
        float answer = run.answer[i];
        if (row.guided && run.push[sample] != 0.0f)
            answer += run.push[sample] * (answer - run.answer[size + i]);
        if (!(fabsf(answer) <= 3.402823466e38f) && run.bad[sample] < 0) run.bad[sample] = r;
        float m = answer * row.from_answer;
        m += x * row.from_x;
        if (run.on_x0) {
            m = fminf(fmaxf(m, -run.limit), run.limit);
            if (run.known) m += (run.y[i] - m * known) * (known * row.weight);
            run.x0[i] = m;
            if (run.form_eps) {
                m *= row.eps_from_x0;
                m += x * row.eps_from_x;
            }
        } else {
            run.x0[i] = run.form_eps ? (x - row.noise * m) / row.signal : m;
        }
        for (long long k = run.history - 1; k > 0; k--)
            run.m[k * size + i] = run.m[(k - 1) * size + i];
        run.m[i] = m;
    }
    float next = x * row.a;
    for (long long k = 0; k < run.history; k++)
        next += run.m[k * size + i] * run.b[r * run.history + k];
    if (row.s != 0.0f) {
        float z = normal(run.seed, row.stream, run.first + sample, row.number, i % run.values);
        z += z * known * (known * (row.kept - 1.0f));
        next += z * row.s;
    }
    run.x[i] = next;
    if (run.questions > run.batch) run.x[size + i] = next;
}
