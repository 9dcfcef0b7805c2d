// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Marks what changes on one disk: sets the bit of each grain of the volume
// that a write, discard or zero-out touches, then the bit of the bit's line in the
// summary, and counts the sectors of the whole disk. It can do so twice, when the
// write begins and when it has ended, in the same bits and in counts of their own:
// an event of either kind can be lost, and what the other saw then still tells.
//
// A disk with a request queue (loop, NVMe, virtio, SCSI) is seen by
// request_begun and request_done, after all merging and splitting; request_back
// notes that a request will begin once more. A disk that takes bios as they come
// (device-mapper, md, brd, zram) is seen by bio_queued and bio_done: at completion such
// a bio may carry only what is left of it, so its range is kept until then.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u64 sector_t;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static __attribute__((always_inline)) inline
#define RELOCATED __attribute__((preserve_access_index))

// The fields this needs of the kernel's structures; the loader finds where the
// running kernel has them.
struct gendisk {
	int major;
	int first_minor;
} RELOCATED;
struct request_queue {
	struct gendisk *disk;
} RELOCATED;
struct block_device {
	struct gendisk *bd_disk;
} RELOCATED;
struct bvec_iter {
	sector_t bi_sector;
	u32 bi_size;
} RELOCATED;
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	u8 bi_status;
	struct bvec_iter bi_iter;
} RELOCATED;
struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u32 __data_len;
	sector_t __sector;
	struct bio *bio;
} RELOCATED;

// Operations, include/linux/blk_types.h: the same numbers since Linux 4.10.
enum {
	OP_MASK = 0xff,
	OP_READ = 0,
	OP_WRITE = 1,
	OP_FLUSH = 2,
	OP_DISCARD = 3,
	OP_SECURE_ERASE = 5,
	OP_WRITE_ZEROES = 9,
	OP_DRV_IN = 34, // a driver's own command that reads
};

// Maps, in the form the loader reads. Sizes of 1 are set by the loader.
#define UINT(name, value) int(*name)[value]
enum { TYPE_HASH = 1, TYPE_ARRAY = 2, FLAG_MMAPABLE = 1 << 10 };

// The bits of the volume's grains, then those of the summary: bit n of the
// summary stands for words 8n to 8n+7, one line of the processor's cache.
struct {
	UINT(type, TYPE_ARRAY);
	UINT(map_flags, FLAG_MMAPABLE);
	UINT(key_size, 4);
	UINT(value_size, 8);
	UINT(max_entries, 1);
} active SEC(".maps");

// Eight counts for each processor; see SLOT_.
struct {
	UINT(type, TYPE_ARRAY);
	UINT(map_flags, FLAG_MMAPABLE);
	UINT(key_size, 4);
	UINT(value_size, 64);
	UINT(max_entries, 1);
} counts SEC(".maps");

enum {
	SLOT_ENDED = 0, // sectors of what has ended: written, zeroed and erased; then discarded
	SLOT_BEGUN = 2, // the same of what has begun
	SLOT_STRANGE = 4, // commands that may have changed what no sector number tells
	SLOT_FAILED,    // marks that could not be made
	SLOT_AGAIN,     // requests that begin more than once
	SLOT_TURN,      // how often the loader found that ends were lost, on each processor
};

// What is in flight on a disk without requests: bio -> its range. One whose end was
// lost stays, and another bio may come to lie where that one lay. In the same turn its
// end then stands for the lost one's; later it would make up for another loss. The
// loader begins a turn when it finds that ends were lost, with nothing in flight.
struct flight {
	u64 sector;
	u32 sectors;
	u32 op;
	u64 turn;
};
struct {
	UINT(type, TYPE_HASH);
	UINT(key_size, 8);
	UINT(value_size, sizeof(struct flight));
	UINT(max_entries, 1);
} flying SEC(".maps");

static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*map_delete)(void *map, const void *key) = (void *)3;
static u32 (*processor)(void) = (void *)8;
static long (*read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static long (*loop)(u32 rounds, void *callback, void *context, u64 flags) = (void *)181;

// Set by the loader.
volatile const u32 disk_major;
volatile const u32 disk_minor;
volatile const u64 first_sector;  // of the volume on the disk
volatile const u64 volume_sectors;
volatile const u32 grain_shift;   // a grain has 1 << grain_shift sectors
volatile const u32 summary_word;  // where the summary begins

INLINE void count(u32 slot, u64 n)
{
	u32 cpu = processor();
	u64 *line = map_lookup(&counts, &cpu);
	if (line)
		__sync_fetch_and_add(line + slot, n);
}

INLINE u64 turn(void)
{
	u32 cpu = processor();
	u64 *line = map_lookup(&counts, &cpu);
	return line ? ((volatile u64 *)line)[SLOT_TURN] : 0;
}

// mark sets the bits, then their line's bit. Whoever takes marks clears the
// line first: either it then sees these bits, or it leaves the line's bit set
// for the next time. That needs a full barrier between the two, which an atomic
// operation is only when its result is used.
INLINE void mark(u32 word, u64 bits)
{
	u64 *at = map_lookup(&active, &word);
	// Bits that are set need nothing: whoever set them sees to the line's bit, and
	// whoever takes them from now on reads the disk after that.
	if (at && (*(volatile u64 *)at & bits) == bits)
		return;
	u32 line = summary_word + (word >> 9);
	u64 line_bit = 1ULL << (word >> 3 & 63);
	u64 *summary = map_lookup(&active, &line);
	if (!at || !summary) {
		count(SLOT_FAILED, 1);
		return;
	}
	u64 before = __sync_fetch_and_or(at, bits);
	// 'before' is used so that the operation above is one with a result.
	asm volatile("" : : "r"(before));
	if (!(*(volatile u64 *)summary & line_bit)) {
		before = __sync_fetch_and_or(summary, line_bit);
		asm volatile("" : : "r"(before));
	}
}

static long mark_full(u32 index, void *context)
{
	mark(*(u32 *)context + index, ~0ULL);
	return 0;
}

INLINE void mark_range(u64 sector, u64 sectors)
{
	u64 end = sector + sectors;
	if (end <= first_sector || sector >= first_sector + volume_sectors)
		return;
	u64 from = sector > first_sector ? sector - first_sector : 0;
	u64 to = end - first_sector;
	if (to > volume_sectors)
		to = volume_sectors;
	u64 first = from >> grain_shift, last = (to - 1) >> grain_shift;
	u32 word = first >> 6, last_word = last >> 6;
	u64 head = ~0ULL << (first & 63), tail = ~0ULL >> (63 - (last & 63));
	if (word == last_word) {
		mark(word, head & tail);
		return;
	}
	mark(word, head);
	u32 next = word + 1;
	if (last_word > next && loop(last_word - next, mark_full, &next, 0) < 0)
		count(SLOT_FAILED, 1);
	mark(last_word, tail);
}

INLINE int ours(struct gendisk *disk)
{
	return disk && (u32)disk->major == disk_major && (u32)disk->first_minor == disk_minor;
}

// changes says whether an operation changes sectors that it names.
INLINE int changes(u32 op)
{
	return op == OP_WRITE || op == OP_DISCARD || op == OP_WRITE_ZEROES || op == OP_SECURE_ERASE;
}

// strange says whether one may change others: whoever asks is told that this is
// not covered. Commands of a driver's own, operations on zones.
INLINE int strange(u32 op)
{
	return !changes(op) && op != OP_READ && op != OP_FLUSH && op != OP_DRV_IN;
}

INLINE void count_sectors(u32 slot, u32 op, u64 sectors)
{
	count(slot + (op == OP_DISCARD), sectors);
}

// One discard request may hold several ranges far from each other: a chain of
// bios, of which the request itself names only the first.
enum { MOST_RANGES = 1 << 12 };

static long mark_bio(u32 index, void *context)
{
	struct bio **chain = context, *bio = *chain;
	u64 sector = 0;
	u32 size = 0;
	if (!bio)
		return 1;
	if (read_kernel(&sector, sizeof(sector), &bio->bi_iter.bi_sector) ||
	    read_kernel(&size, sizeof(size), &bio->bi_iter.bi_size) ||
	    read_kernel(chain, sizeof(*chain), &bio->bi_next)) {
		count(SLOT_FAILED, 1);
		*chain = 0;
		return 1;
	}
	mark_range(sector, size >> 9);
	return 0;
}

// Sectors are counted last: a count that includes a write means it is marked.

INLINE int request(u64 *args, u32 slot, u32 bytes)
{
	struct request *rq = (void *)args[0];
	u32 op = rq->cmd_flags & OP_MASK;
	if (strange(op))
		count(SLOT_STRANGE, 1);
	u64 sectors = bytes >> 9;
	if (!changes(op) || !sectors)
		return 0;
	mark_range(rq->__sector, sectors);
	struct bio *bio = rq->bio;
	if (op == OP_DISCARD && bio && bio->bi_next) {
		u64 chain = (u64)bio;
		loop(MOST_RANGES, mark_bio, &chain, 0);
		if (chain)
			count(SLOT_FAILED, 1);
	}
	count_sectors(slot, op, sectors);
	return 0;
}

SEC("tp_btf/block_rq_issue")
int request_begun(u64 *args)
{
	struct request *rq = (void *)args[0];
	return ours(rq->q->disk) ? request(args, SLOT_BEGUN, rq->__data_len) : 0;
}

SEC("tp_btf/block_rq_requeue")
int request_back(u64 *args)
{
	struct request *rq = (void *)args[0];
	if (ours(rq->q->disk))
		count(SLOT_AGAIN, 1);
	return 0;
}

SEC("tp_btf/block_rq_complete")
int request_done(u64 *args)
{
	struct request *rq = (void *)args[0];
	return ours(rq->q->disk) ? request(args, SLOT_ENDED, args[2]) : 0;
}

SEC("tp_btf/block_bio_queue")
int bio_queued(u64 *args)
{
	struct bio *bio = (void *)args[0];
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	if (!ours(disk))
		return 0;
	u32 op = bio->bi_opf & OP_MASK;
	if (strange(op))
		count(SLOT_STRANGE, 1);
	struct flight flight = {bio->bi_iter.bi_sector, bio->bi_iter.bi_size >> 9, op, turn()};
	if (!changes(op) || !flight.sectors)
		return 0;
	mark_range(flight.sector, flight.sectors);
	u64 key = (u64)bio;
	map_update(&flying, &key, &flight, 0); // without it bio_done does not count
	count_sectors(SLOT_BEGUN, op, flight.sectors);
	return 0;
}

SEC("tp_btf/block_bio_complete")
int bio_done(u64 *args)
{
	struct bio *bio = (void *)args[1];
	u64 key = (u64)bio;
	struct flight *flight = map_lookup(&flying, &key);
	if (!flight)
		return 0;
	u32 op = flight->op;
	u64 sectors = flight->sectors;
	int lost = flight->turn != turn();
	mark_range(flight->sector, sectors);
	map_delete(&flying, &key);
	if (lost)
		return 0;
	// The statistics may have one that failed or not, as one that would have had to
	// wait (io_uring begins so). Not counted it can make them be ahead, which voids,
	// but never hide what was lost.
	if (bio->bi_status)
		count_sectors(SLOT_BEGUN, op, -sectors);
	else
		count_sectors(SLOT_ENDED, op, sectors);
	return 0;
}

// The kernel lends the fields of its structures only to programs that say
// they may be had under the GPL, as this one may.
char terms[] SEC("license") = "GPL";
