// Package precopy fixes a point in time of a device without copying anything
// out: what changed is read into memory in rounds while writes go on, each
// round only what was written since the one before; when what is left can be
// read within the stall budget, writers are stopped, the rest is read, and
// writers go on. How they are stopped is the caller's: a suspend, a freeze.
//
// # Why the image is one moment
//
// Let X1, X2 … be the rounds' exchanges of the tracker's marks, the last one, Xn,
// made while writers stand still. Round i reads what Xi took, after Xi; all that
// changed since the base is taken by one of them. The tracker marks a block when
// a write to it completes, so of any write there are three cases.
//
// It completed before Xi: its mark is in what Xi, or one before, took, and the
// read that follows sees it. It was in flight at Xi, or began after: the read of
// round i may see all, some or nothing of it. But it completes after Xi, so its
// block is taken again by a later exchange, and read again. Hence a block that
// is not taken after Xi had no write complete between Xi and the stop, and
// as nothing is in flight once writers stand still, none that round i could have
// half seen. What was read of it is what it held at the stop.
//
// This needs three things. Marks at completion, not only at submission: where the
// tracker says that it missed some, all that changed since the base is read again, in
// rounds that begin anew; what began by then has a mark of that. A stop
// that waits for what is in flight, and holds until the last read: the stop itself
// says so, and a mark made within it voids the cut. And reads that see every
// completed write: direct I/O on the device.
//
// A cut that is given up loses nothing: what its exchanges took is kept, and belongs
// to the next.
package precopy
