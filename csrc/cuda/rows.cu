// Launchers of the embedding and the gather.
#include "launch.cuh"
#include "mii/abi/rows.h"
#include "mii/rows.cuh"

namespace mii {
namespace {

constexpr int kThreads = 128;

struct RowGrid {
  int chunks, threads;
  Shape shape(int64_t rows) const { return Shape{dim3(rows * chunks), dim3(threads)}; }
};

// Splits a row of `count` packs over CTAs of at most 128 threads with kRowPacks packs each, evenly.
RowGrid row_grid(int64_t count) {
  const int64_t chunks = ceil_div(count, int64_t(kThreads * kRowPacks));
  const int64_t threads = ceil_div(ceil_div(count, chunks * kRowPacks), int64_t(kWarp)) * kWarp;
  return {static_cast<int>(chunks), static_cast<int>(threads)};
}

template <typename Bits>
int32_t gather(const MiiGather& a, int element, void* stream) {
  const int64_t units = sizeof(Bits) / element;  // elements of one Bits
  const int64_t count = a.width / units;
  const RowGrid grid = row_grid(count);
  return launch("mii_gather", gather_rows<Bits>, grid.shape(a.rows), stream, static_cast<Bits*>(a.out),
                static_cast<const Bits*>(a.x), a.index, a.x_stride / units, static_cast<int>(count), grid.chunks);
}

template <typename T, int N>
int32_t embedding(const MiiEmbedding& a, void* stream) {
  const int64_t count = a.width / N;
  const RowGrid grid = row_grid(count);
  const EmbeddingArgs<T> args = {static_cast<T*>(a.out),
                                 static_cast<const T*>(a.table),
                                 a.ids,
                                 static_cast<const T*>(a.position_table),
                                 a.positions,
                                 a.vocab,
                                 a.max_positions,
                                 a.position_offset,
                                 static_cast<int>(count),
                                 grid.chunks,
                                 a.scale};
  return launch("mii_embedding", embedding_rows<T, N>, grid.shape(a.rows), stream, args);
}

// Keeps rows * chunks below the largest grid, whatever the path.
int32_t check_rows(const char* name, int64_t rows, int64_t width) {
  const bool fits = rows >= 0 && width > 0 && width < INT32_MAX && rows * ceil_div(width, int64_t(256)) <= INT32_MAX;
  return fits ? MII_OK : fail(MII_UNSUPPORTED, "%s: %lld rows of %lld", name, (long long)rows, (long long)width);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_gather(const MiiGather* a, void* stream) {
  using namespace mii;
  if (const int32_t code = check_rows("gather", a->rows, a->width); code != MII_OK) return code;
  MII_REQUIRE(a->dtype >= MII_F32 && a->dtype <= MII_BF16, MII_UNSUPPORTED, "gather: dtype code %d", a->dtype);
  if (a->rows == 0) return MII_OK;
  const int element = a->dtype == MII_F32 ? 4 : 2;
  const bool wide = a->width * element % 16 == 0 && a->x_stride * element % 16 == 0;
  if (wide && aligned(a->out, 16) && aligned(a->x, 16)) return gather<uint4>(*a, element, stream);
  return element == 4 ? gather<uint32_t>(*a, element, stream) : gather<uint16_t>(*a, element, stream);
}

extern "C" int32_t mii_embedding(const MiiEmbedding* a, void* stream) {
  using namespace mii;
  if (const int32_t code = check_rows("embedding", a->rows, a->width); code != MII_OK) return code;
  if (a->rows == 0) return MII_OK;  // the tensors of no rows may have null addresses
  MII_REQUIRE(a->vocab > 0, MII_INVALID, "embedding: a table of %lld rows", (long long)a->vocab);
  MII_REQUIRE(a->position_table == nullptr || (a->positions != nullptr && a->max_positions > 0), MII_INVALID,
              "embedding: a position table needs positions and at least one row");
  return dispatch_dtype(a->dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool pointers = aligned(a->out, 16) && aligned(a->table, 16) && aligned(a->position_table, 16);
    if (pointers && a->width % kPack<T> == 0) return embedding<T, kPack<T>>(*a, stream);
    return embedding<T, 1>(*a, stream);
  });
}
