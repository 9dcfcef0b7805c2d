// Package bpf says exactly which blocks of a disk have changed. Programs in the
// kernel mark each write, discard and zero-out in a bitmap, when it completes and,
// where need be, when it begins; this package takes what is marked and keeps it by cut.
//
// What is named may be too much, never too little. Events do get lost, so each
// check compares the sectors that the programs saw, at either, with the disk's own
// statistics, exactly; when both differ, or anything else is unknown, that ends
// the coverage: Changed then answers ErrUncovered until a later cut has begun a
// new one. reckoning.go says what is lost when, and what it costs.
//
// # How it is used
//
//	t, err := Open(target)      // goes on from what is pinned, or begins anew
//	loop {
//		t.Exchange()            // a round, while writes go on
//		extents := t.Taken()    // what that round took: read and send it
//	}
//	t.ExchangeStopped()         // once more, with writers stopped: the cut
//	extents := t.Taken()        // after they go on
//	t.Seal(number)              // all that was exchanged since the last Seal changed before this cut
//	t.Changed(since, number)    // what changed between two cuts
//	t.Forget(number)            // every replica holds this cut
//
// The rules for a caller:
//
//   - No Exchange between that of the cut and its Seal: what it takes would
//     count as before the cut (which names it too early, and so may miss it).
//   - A cut that is given up is not sealed. What its exchanges took belongs to
//     the next cut.
//   - The coverage begins at the first Seal after Open that returns nil: Changed
//     answers from its number on. An earlier base needs another source (the era's
//     marks, or a full compare).
//   - The Seal that finds events lost, or the first after Void, returns
//     ErrUncovered; that cut needs another source too. The next Seal begins a new
//     coverage.
//   - ExchangeStopped may say that the rounds before it are worth nothing: then
//     they are to begin anew. A cut for which nothing was read before need not mind.
//   - Between it and Seal no other call is needed; the check of the statistics is
//     made within it, where nothing is in flight and it is exact.
//   - A cut may be sealed after an Exchange while writes go on, if Settled: of disks
//     without requests (device-mapper, md, zram, brd) it never is. A write in flight then
//     changed after that cut.
//   - The kernel must keep the disk's statistics; Open switches them on.
//
// The maps and links are pinned in a folder of a bpffs: tracking goes on
// without this process. Only one Tracker may have a folder open.
package bpf
