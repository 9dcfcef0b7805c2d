package protocol

import (
	"bytes"
	"context"
	"errors"
	"reflect"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/proto"
)

// Who is not admitted neither writes nor reads, is told why, and is told of.
func TestAdmission(t *testing.T) {
	o := FormatOptions{VolumeUUID: testUUID, SizeBytes: testVolumeSize, JournalBytes: 16 << 20}
	store := &ram{make([]byte, o.NeededBytes())}
	_, recv := servedReplicaOn(t, store, o)
	before := bytes.Clone(store.b)
	var mu sync.Mutex
	var asked []Admission
	var told []string
	allow := false
	recv.cfg.Admit = func(_ context.Context, a Admission) (Admitted, error) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, a)
		if allow {
			return Admitted{"node 'node-a'", "ebs"}, nil
		}
		return Admitted{}, &RefusedError{Reason: proto.Reason_REASON_WRONG_VOLUME, Message: "not you"}
	}
	recv.cfg.Events.Refused = func(_ context.Context, err *RefusedError) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, err.Message)
	}
	client := wireClient(t, recv, ServerOptions())
	config := LinkConfig{Volume: "data", VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}
	var refused *RefusedError
	if _, err := Connect(t.Context(), client, config, line(1, 1)); !errors.As(err, &refused) || refused.Message != "not you" {
		t.Errorf("a session: %v", err)
	}
	stream, err := client.Restore(t.Context(), &proto.RestoreRequest{VolumeUuid: testUUID[:], Replica: "ebs"})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "not you") {
		t.Errorf("a restore: %v", err)
	}
	for _, id := range [][]byte{nil, testUUID[:15], append(bytes.Clone(testUUID[:]), 0)} {
		stream, err := client.Restore(t.Context(), &proto.RestoreRequest{VolumeUuid: id, Replica: "ebs"})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("a restore of volume %x: %v", id, err)
		}
	}
	mu.Lock()
	want := []Admission{{testUUID, "data", "ebs", testVolumeSize, false, line(1, 1)}, {testUUID, "", "ebs", 0, true, nil}}
	if !reflect.DeepEqual(asked, want) || len(told) != 1 || told[0] != "not you" {
		t.Errorf("asked %+v, told %q", asked, told)
	}
	allow = true
	mu.Unlock()
	if !bytes.Equal(store.b, before) {
		t.Error("something was written")
	}
	link, err := Connect(t.Context(), client, config, line(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	if s := recv.Status()[0].Session; s == nil || s.From != "node 'node-a'" {
		t.Errorf("session %+v", s)
	}
	link.Close()
}
