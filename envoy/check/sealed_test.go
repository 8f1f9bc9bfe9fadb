package check

import (
	"bytes"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// TestHalfAnswersDoNotLeave: to Envoy an empty response is an allow.
func TestHalfAnswersDoNotLeave(t *testing.T) {
	allow, deny := &status.Status{}, &status.Status{Code: int32(codes.PermissionDenied)}
	ok := &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}
	denied := &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{}}
	failed := &authv3.CheckResponse_ErrorResponse{ErrorResponse: &authv3.DeniedHttpResponse{}}
	for name, tt := range map[string]struct {
		answer *authv3.CheckResponse
		leaves bool
	}{
		"nothing":                {nil, false},
		"empty":                  {&authv3.CheckResponse{}, false},
		"status alone":           {&authv3.CheckResponse{Status: allow}, false},
		"denial without status":  {&authv3.CheckResponse{HttpResponse: denied}, false},
		"denial with an allow's": {&authv3.CheckResponse{Status: allow, HttpResponse: denied}, false},
		"error with an allow's":  {&authv3.CheckResponse{Status: allow, HttpResponse: failed}, false},
		"allow with a denial's":  {&authv3.CheckResponse{Status: deny, HttpResponse: ok}, false},
		"refusal alone":          {&authv3.CheckResponse{Status: deny}, false},
		"allow":                  {&authv3.CheckResponse{Status: allow, HttpResponse: ok}, true},
		"denial":                 {&authv3.CheckResponse{Status: deny, HttpResponse: denied}, true},
		"error":                  {&authv3.CheckResponse{Status: deny, HttpResponse: failed}, true},
	} {
		message, err := proto.Marshal(tt.answer)
		if err != nil {
			t.Fatal(err)
		}
		out, err := sealed(message, nil)
		if left := err == nil && out != nil; left != tt.leaves {
			t.Errorf("%s: left %v, want %v", name, left, tt.leaves)
		}
		if tt.leaves { // cut anywhere, or followed by anything
			for n := range message {
				if _, err := sealed(message[:n], nil); err == nil {
					t.Errorf("%s: left after %d of %d bytes", name, n, len(message))
				}
			}
			if _, err := sealed(append(message, message...), nil); err == nil {
				t.Errorf("%s: left twice", name)
			}
		}
	}
}

// TestLengthsOfEveryWidth: room is left for a length of one byte, and made for more.
func TestLengthsOfEveryWidth(t *testing.T) {
	for _, around := range []int{0, 1 << 7, 1 << 14, 1 << 21} {
		for n := max(0, around-2); n <= around+2; n++ {
			dst := append(make([]byte, 0, 3), 'a') // without room, so that it moves
			dst, begin := open(dst, responseOK)
			for i := range n {
				dst = append(dst, byte(i*7))
			}
			dst = shut(dst, begin)
			content := make([]byte, n)
			for i := range content {
				content[i] = byte(i * 7)
			}
			want := protowire.AppendBytes(protowire.AppendTag([]byte{'a'}, 3, protowire.BytesType), content)
			if !bytes.Equal(dst, want) {
				t.Errorf("%d bytes: written wrongly", n)
			}
		}
	}
}
