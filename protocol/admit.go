package protocol

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/proto"
)

// AnyVolume is the volume of a replica that was formatted before its volume is
// known, to be formatted again for the first one that may have it. A Receiver
// does not serve it.
var AnyVolume = [16]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// Admission is what somebody who called asks for, before anything is looked at
// or written. Its words are the caller's, and not checked.
type Admission struct {
	VolumeUUID [16]byte
	Volume     string // name; "" for a restore
	Replica    string
	SizeBytes  uint64  // 0 for a restore
	Restore    bool    // reads the image; else a session, which writes it
	Lineage    Lineage // of the primary that calls; empty for a restore, or when it is malformed
}

// Admitted is who calls, in words, and the name under which the replica meant is
// served here.
type Admitted struct {
	From, Name string
}

// AdmitFunc decides whether the caller, known by ctx, may have what it asks
// for. A *RefusedError is told to the caller as it is.
type AdmitFunc func(ctx context.Context, a Admission) (Admitted, error)

// admitSession is before a session.
func (r *Receiver) admitSession(rs *receiverSession, h *proto.Hello) error {
	rs.asked, rs.name = clip(h.Replica), h.Replica
	if r.cfg.Admit == nil {
		return nil
	}
	a := Admission{Volume: clip(h.Volume), Replica: clip(h.Replica), SizeBytes: h.SizeBytes}
	a.Lineage, _ = LineageFromProto(h.Lineage) // the session says what is wrong with it
	if len(h.VolumeUuid) != len(a.VolumeUUID) {
		return outOfOrder("a volume's id has %d bytes, not %d", len(a.VolumeUUID), len(h.VolumeUuid))
	}
	copy(a.VolumeUUID[:], h.VolumeUuid)
	who, err := r.cfg.Admit(rs.ctx, a)
	if err == nil {
		rs.from, rs.name = who.From, who.Name
	}
	return err
}

// admitRestore is before a restore; it returns the name under which the replica is
// served. A volume that is written here is refused with FailedPrecondition, all else with
// PermissionDenied.
func (r *Receiver) admitRestore(ctx context.Context, req *proto.RestoreRequest) (string, error) {
	if r.cfg.Admit == nil {
		return req.Replica, nil
	}
	a := Admission{Replica: clip(req.Replica), Restore: true}
	if copy(a.VolumeUUID[:], req.VolumeUuid) != len(req.VolumeUuid) || len(req.VolumeUuid) != len(a.VolumeUUID) {
		return "", status.Errorf(codes.InvalidArgument, "a volume's id has %d bytes, not %d", len(a.VolumeUUID), len(req.VolumeUuid))
	}
	who, err := r.cfg.Admit(ctx, a)
	var refused *RefusedError
	if errors.As(err, &refused) {
		if refused.Reason == proto.Reason_REASON_PRIMARY {
			return "", status.Error(codes.FailedPrecondition, refused.Message)
		}
		return "", status.Error(codes.PermissionDenied, refused.Message)
	}
	return who.Name, err
}
