package proto

// FromPrimary_Bundle stands for a Frames message whose bytes lie in several
// pieces of memory. What it holds is protocol's; only its codec and its
// streams within a process carry it, protobuf itself can't.
type FromPrimary_Bundle struct{ Bundle any }

func (*FromPrimary_Bundle) isFromPrimary_Message() {}
